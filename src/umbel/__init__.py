"""umbel: federated LoRA fine-tuning of language models, with the aggregation right."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from umbel.merging import aggregate as aggregate
    from umbel.merging import merge as merge

__version__ = "0.1.0"


__all__ = ["aggregate", "merge"]


def __dir__() -> list[str]:
    return [*globals(), *__all__]


def __getattr__(name: str) -> Any:
    # When first asked for, so that importing umbel stays light.
    if name in ("aggregate", "merge"):
        from umbel import merging

        return getattr(merging, name)
    raise AttributeError(f"module 'umbel' has no attribute {name!r}")
