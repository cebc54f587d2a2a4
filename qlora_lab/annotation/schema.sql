-- What an annotation study keeps. Answers are copied in: the files they come from may change or go.
CREATE TABLE study (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE questions (question TEXT PRIMARY KEY, category TEXT NOT NULL, prompt TEXT NOT NULL);
CREATE TABLE answers (
    question TEXT NOT NULL REFERENCES questions,
    system TEXT NOT NULL,
    answer TEXT NOT NULL,
    PRIMARY KEY (question, system)
);
CREATE TABLE comparisons (
    question TEXT NOT NULL REFERENCES questions,
    one TEXT NOT NULL,
    other TEXT NOT NULL,
    PRIMARY KEY (question, one, other)
);
CREATE TABLE annotators (
    number INTEGER PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    token TEXT NOT NULL UNIQUE -- whoever has it votes as this annotator
);
CREATE TABLE items (
    annotator INTEGER NOT NULL REFERENCES annotators,
    position INTEGER NOT NULL,
    question TEXT NOT NULL REFERENCES questions,
    first TEXT NOT NULL, -- the systems, in the order in which their answers are shown
    second TEXT NOT NULL,
    repeat INTEGER NOT NULL,
    PRIMARY KEY (annotator, position)
);
-- Rows are added, never changed but for `undone`: what an annotator took back stays on record.
CREATE TABLE votes (
    number INTEGER PRIMARY KEY,
    annotator INTEGER NOT NULL,
    position INTEGER NOT NULL,
    verdict TEXT NOT NULL CHECK (verdict IN ('first', 'second', 'tie')),
    milliseconds INTEGER NOT NULL,
    voted_at TEXT NOT NULL, -- UTC, ISO 8601
    undone INTEGER NOT NULL DEFAULT 0,
    FOREIGN KEY (annotator, position) REFERENCES items
);
CREATE UNIQUE INDEX one_vote_counts ON votes (annotator, position) WHERE undone = 0;
