"""Asking a model behind an OpenAI-compatible endpoint, through the `openai` package."""

import os
import threading
from collections.abc import Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

from qlora_lab.errors import ConfigError, JudgeError, nearest
from qlora_lab.judging.cache import Response
from qlora_lab.judging.cost import cost_of, most_cost
from qlora_lab.judging.pace import Pace
from qlora_lab.judging.prompts import Message
from qlora_lab.judging.settings import JudgeConfig
from qlora_lab.judging.work import Unanswered

# Refusals that are about one request's text, whatever else the endpoint would answer.
ABOUT_THE_TEXT = ("context_length_exceeded", "content_filter", "content_policy_violation", "string_above_max_length")
NO_CREDIT = "insufficient_quota"
SHOWN_MODELS = 10
NO_KEY_NEEDED = "none"  # the package wants one
HIDDEN = "***"


class Endpoint:
    """Sends requests, one at a time from each of several threads; retries are decided here, for all of them together.

    Raises:
        ConfigError: the `openai` package is not installed, or the key's variable is not set.
    """

    batch = 1
    paid = True

    def __init__(self, config: JudgeConfig, stop: threading.Event) -> None:
        try:
            import openai
        except ImportError as error:
            raise ConfigError(
                "judging through an endpoint needs the openai package; pip install 'qlora_lab[judge]'"
            ) from error
        self._openai: Any = openai
        self._config = config
        self._key = "" if config.key_variable is None else os.environ.get(config.key_variable, "").strip()
        if config.key_variable is not None and not self._key:
            raise ConfigError(
                f"the environment variable {config.key_variable} must hold the endpoint's key; it is not set "
                "(key_variable names another one, or is null for a server that needs none)"
            )
        self.workers = config.concurrency
        self._pace = Pace(config.requests_per_minute, config.backoff_s, config.max_wait_s, stop)
        self._has_replied = False
        self._client: Any = openai.OpenAI(
            api_key=self._key or NO_KEY_NEEDED, base_url=config.base_url, timeout=config.timeout_s, max_retries=0
        )

    def ask(self, conversations: Sequence[list[Message]]) -> list[Response | Unanswered]:
        """Return the reply to each conversation, or why there is none although the endpoint answers others.

        Raises:
            ConfigError: the endpoint refuses the key, the model or the settings.
            JudgeError: it has refused or failed for longer than max_wait_s, or there is no credit.
            Stopping: the command is ending.
        """
        return [self._ask(messages) for messages in conversations]

    def _ask(self, messages: list[Message]) -> Response | Unanswered:
        failures = 0
        while True:
            sent_at = self._pace.wait()
            try:
                response = self._response(self._send(messages), messages)
            except self._openai.RateLimitError as error:
                if error.code == NO_CREDIT:
                    raise JudgeError(f"{self._place} has no credit left for this key: {self._said(error)}") from None
                self._pace.refused(sent_at, f"{self._place} refuses requests (429: {self._said(error)})", _pause(error))
                continue
            except self._openai.APIStatusError as error:
                if error.status_code not in (408, 409) and error.status_code < 500:
                    refusal = self._refusal(error)
                    if isinstance(refusal, Unanswered):
                        return refusal
                    raise refusal from None
                failure = f"{self._place} fails ({error.status_code}: {self._said(error)})"
                pause_s = _pause(error)
            except self._openai.APITimeoutError:
                failure, pause_s = f"{self._place} takes longer than timeout_s={self._config.timeout_s:g}", None
            except self._openai.APIConnectionError as error:
                reason = self._hidden(str(error.__cause__ or error))
                self._pace.refused(sent_at, f"{self._place} cannot be reached ({reason})")
                continue
            except (self._openai.APIError, ValueError) as error:  # what came is no reply of the protocol
                failure, pause_s = f"{self._place} replies with something else ({self._hidden(str(error))[:200]})", None
            else:
                self._pace.replied()
                self._has_replied = True
                return response
            failures += 1
            if failures >= self._config.attempts:
                return Unanswered(f"{failure}, {failures} times")
            self._pace.refused(sent_at, failure, pause_s)

    def _send(self, messages: list[Message]) -> Any:
        sampling = self._config.sampling()
        return self._client.chat.completions.create(
            model=self._config.model,
            messages=messages,
            extra_body=sampling,
        )

    def _response(self, completion: Any, messages: list[Message]) -> Response:
        """Read a completion.

        Raises:
            ValueError: it is none.
        """
        choices = getattr(completion, "choices", None)
        if not choices or getattr(choices[0], "message", None) is None:
            raise ValueError(f"{type(completion).__name__} {str(completion)[:100]}")
        price, content = self._config.price, choices[0].message.content
        prompt, written = (
            getattr(getattr(completion, "usage", None), name, None) for name in ("prompt_tokens", "completion_tokens")
        )
        if prompt is None or written is None:
            cost = most_cost(price, messages, self._config.max_tokens)
        else:
            cost = cost_of(price, prompt, written)
        return Response(
            text=self._hidden(content if isinstance(content, str) else ""),
            model=str(completion.model or self._config.model),
            finish_reason=choices[0].finish_reason,
            prompt_tokens=prompt,
            completion_tokens=written,
            cost=cost,
            date=datetime.now(UTC).isoformat(timespec="seconds"),
        )

    def _refusal(self, error: Any) -> Unanswered | ConfigError:
        """Word what the endpoint will not do however often it is asked."""
        said = self._said(error)
        if error.status_code in (401, 403):
            where = f"in {self._config.key_variable}" if self._key else "and key_variable is null"
            return ConfigError(f"{self._place} refuses the key ({where}): {said}; set the variable to a valid one")
        if error.status_code == 404:
            return ConfigError(f"{self._place} has no model '{self._config.model}': {said}{self._models()}")
        if error.code in ABOUT_THE_TEXT or error.status_code == 413 or self._has_replied:
            return Unanswered(f"{self._place} refuses the request ({error.status_code}: {said})")
        return ConfigError(
            f"{self._place} refuses the request ({error.status_code}: {said}); change the judge's settings"
        )

    def _models(self) -> str:
        try:
            names = sorted(str(model.id) for model in self._client.models.list())
        except (self._openai.APIError, ValueError, TypeError, AttributeError):
            return "; it does not say which it has"
        shown = ", ".join(names[:SHOWN_MODELS]) + (", ..." if len(names) > SHOWN_MODELS else "")
        return f"; it has {shown}{nearest(self._config.model, names)}"

    @property
    def _place(self) -> str:
        return str(self._client.base_url).rstrip("/")

    def _said(self, error: Any) -> str:
        body = error.body if isinstance(error.body, dict) else {}
        return self._hidden(str(body.get("message") or error.message))[:300].rstrip(".")

    def _hidden(self, text: str) -> str:
        return text.replace(self._key, HIDDEN) if self._key else text


def _pause(error: Any) -> float | None:
    """Return the seconds that a refusal asks to wait: a number, or until a date."""
    told = error.response.headers.get("retry-after", "")
    try:
        return max(0.0, float(told))
    except ValueError:
        pass
    try:
        return max(0.0, (parsedate_to_datetime(told) - datetime.now(UTC)).total_seconds())
    except (TypeError, ValueError):
        return None
