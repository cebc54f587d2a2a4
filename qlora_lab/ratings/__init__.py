"""Who answers better: judgments of pairs of answers, ratings made of them, how far judges agree. Never torch."""
