"""Numbers and names as people read them."""

from collections.abc import Mapping, Sequence
from typing import Any

MISSING = "–"


def score(value: float | None) -> str:
    """
    >>> score(0.61249), score(None)
    ('0.612', '–')
    """
    return MISSING if value is None else f"{value:.3f}"


def difference(value: float | None) -> str:
    """
    >>> difference(0.05), difference(-0.05)
    ('+0.050', '−0.050')
    """
    return MISSING if value is None else f"{value:+.3f}".replace("-", "−")


def error(value: float | None) -> str:
    """Returns an aggregation error.

    >>> error(0.0312), error(0.0)
    ('3.1e-02', '0.0e+00')
    """
    return MISSING if value is None else f"{value:.1e}"


def hidden(privacy: Mapping[str, Any]) -> str:
    """Returns what a run's [privacy] keeps from others; "" where it keeps nothing.

    >>> hidden({"unit": "example", "target_epsilon": 3.0, "target_delta": 1e-5, "secure_aggregation": True})
    'each row: ε ≤ 3 at δ = 1e-05; each upload, in masked sums'
    """
    unit = {"example": "each row", "client": "each client’s part"}.get(privacy.get("unit", "none"))
    told = [f"{unit}: ε ≤ {privacy['target_epsilon']:g} at δ = {privacy['target_delta']:g}"] if unit else []
    return "; ".join([*told, *(["each upload, in masked sums"] if privacy.get("secure_aggregation") else [])])


def epsilon(value: float | None) -> str:
    """Returns what differential privacy has cost.

    >>> epsilon(2.98731), epsilon(None)
    ('2.99', '–')
    """
    return MISSING if value is None else f"{value:.3g}"


def size(value: float | None) -> str:
    """Returns bytes in powers of 1000.

    >>> size(950), size(1_234_567), size(999_960)
    ('950 B', '1.23 MB', '1.00 MB')
    """
    if value is None:
        return MISSING
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if round(value, 0 if unit == "B" else 1) < 1000 or unit == "TB":
            break
        value /= 1000
    return f"{value:.0f} B" if unit == "B" else f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f} {unit}"


def duration(value: float | None) -> str:
    """
    >>> duration(0.0312), duration(12.34), duration(192), duration(7500)
    ('31 ms', '12.3 s', '3m 12s', '2h 05m')
    """
    if value is None:
        return MISSING
    if value < 0.9995:
        return f"{value * 1000:.0f} ms"
    if value < 99.95:
        return f"{value:.1f} s"
    minutes, seconds = divmod(round(value), 60)
    return f"{minutes}m {seconds:02}s" if minutes < 60 else f"{minutes // 60}h {minutes % 60:02}m"


def share(value: float | None) -> str:
    """
    >>> share(0.0312), share(0.25)
    ('3.1 %', '25 %')
    """
    return MISSING if value is None else f"{value * 100:.{1 if abs(value) < 0.0995 else 0}f} %"


def power(value: float) -> str:
    """Returns a power of ten, or one digit times one.

    >>> power(1e-7), power(1.0), power(0.02)
    ('10⁻⁷', '1', '2·10⁻²')
    """
    digit, _, exponent = f"{value:.0e}".partition("e")
    raised = "10" + str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return digit if int(exponent) == 0 else raised if digit == "1" else f"{digit}·{raised}"


def cut(text: str, length: int) -> str:
    """
    >>> cut("talk.politics.mideast", 12)
    'talk.politi…'
    """
    return text if len(text) <= length else text[: length - 1] + "…"


def end(text: str, length: int) -> str:
    """Cuts a label from the front: what tells runs apart stands at its end.

    >>> end("seed-0/fedex_lora", 12)
    '…/fedex_lora'
    """
    return text if len(text) <= length else "…" + text[len(text) - length + 1 :]


def count(number: int, noun: str) -> str:
    """
    >>> count(1, "round"), count(1200, "row")
    ('1 round', '1,200 rows')
    """
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def rounds(numbers: Sequence[int]) -> str:
    """Returns round numbers with runs of them joined.

    >>> rounds([1, 2, 3, 7])
    '1–3, 7'
    """
    spans: list[list[int]] = []
    for number in sorted(set(numbers)):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}–{last}" for first, last in spans)


def layers(names: Sequence[str]) -> list[str]:
    """Returns short names: block number and as little of the end as tells the layers apart.

    >>> layers(["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"])
    ['0 q_proj', '1 q_proj']
    >>> layers(["h.0.attn.output.dense", "h.0.output.dense"])
    ['0 attn.output.dense', '0 output.dense']
    """
    parts = [name.split(".") for name in names]
    blocks = [next((part for part in x if part.isdigit()), "") for x in parts]
    short: list[str] = []
    for length in range(1, max(map(len, parts), default=1) + 1):
        ends = [".".join(part for part in x[-length:] if part != block) for x, block in zip(parts, blocks)]
        short = [f"{block} {end}".strip() for block, end in zip(blocks, ends)]
        if len(set(short)) == len(set(names)):
            return short
    return list(names)
