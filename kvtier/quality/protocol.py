"""What one measurement of quality consists of, and the checks that can be made before any of it is computed. Plain numbers."""

from __future__ import annotations

from dataclasses import dataclass

from kvtier.errors import ConfigError

RECALL_DOCUMENTS = 6
CUE_PREDICTIONS = 8
"""The first predictions of a repeated passage: by then a model can know that it is one, and which."""
LEAST_TOKENS = 256


@dataclass(frozen=True)
class Protocol:
    """`tokens` of every document: the KV of the first three quarters goes through the format, in pages of `page_tokens` tokens whose
    numbers are `page_dtype` ("bf16", "fp16", "fp32"), what an engine's own pages would hold.

    ConfigError for fewer than 256 tokens, and for tokens that are not a multiple of four pages.
    """

    tokens: int = 2048
    page_tokens: int = 16
    page_dtype: str = "bf16"

    def __post_init__(self) -> None:
        if self.page_tokens < 1:
            raise ConfigError(f"--page-tokens is {self.page_tokens}; expected at least 1")
        if self.tokens < LEAST_TOKENS:
            raise ConfigError(f"--tokens is {self.tokens}; expected at least {LEAST_TOKENS}")
        if self.tokens % (4 * self.page_tokens):
            near = max(-(-LEAST_TOKENS // (4 * self.page_tokens)), round(self.tokens / (4 * self.page_tokens))) * 4 * self.page_tokens
            raise ConfigError(
                f"--tokens is {self.tokens}; three quarters of a document must be whole pages of {self.page_tokens} tokens, so expected a "
                f"multiple of {4 * self.page_tokens}, such as {near}"
            )

    @property
    def context_tokens(self) -> int:
        """Tokens whose KV goes through the format."""
        return self.tokens * 3 // 4

    @property
    def scored_tokens(self) -> int:
        """Tokens fed after the context with their own KV untouched; all but the last are scored by their successor."""
        return self.tokens * 5 // 32

    @property
    def repeated_tokens(self) -> int:
        """Length of the passage of the context that is repeated after it."""
        return self.tokens // 16

    def as_json(self, documents: int) -> dict[str, object]:
        """The protocol as `--json` shows it."""
        return {
            "documents": documents,
            "tokens": self.tokens,
            "context_tokens": self.context_tokens,
            "scored_tokens": self.scored_tokens - 1,
            "page_tokens": self.page_tokens,
            "page_dtype": self.page_dtype,
            "recall_documents": min(documents, RECALL_DOCUMENTS),
            "recall_scored_tokens": self.repeated_tokens - 1 - CUE_PREDICTIONS,
        }
