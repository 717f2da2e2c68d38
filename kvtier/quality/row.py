"""One line of the result: what a format does to the model. Plain numbers."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class QualityRow:
    """`kl_*`, `delta_nll` (with its standard error over documents) and `recall_nll` in nats per token, `top1_agreement` as a share, errors
    relative; docs/quality.md says what each means. None where it could not be measured."""

    format: str
    bits_per_value: float
    kl_mean: float
    kl_p99: float
    delta_nll: float
    delta_nll_standard_error: float | None
    top1_agreement: float
    recall_nll: float
    k_error: float
    v_error: float
    attention_output_error: float | None

    def as_json(self) -> dict[str, object]:
        """The row as `--json` shows it."""
        return asdict(self)
