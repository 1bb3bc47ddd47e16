"""The memory of each configuration as a table for a terminal, about 110 columns wide."""

from collections.abc import Sequence

from trainer.memory.fit import Need, usable_bytes


def gib(num_bytes: float) -> str:
    """For a person: `4.2`, in GiB, and `0.04` where it is little."""
    number = num_bytes / 2**30
    return f"{number:.1f}" if number >= 0.095 or number == 0 else f"{number:.2f}"


def table(needs: Sequence[Need], *, card_bytes: int | None, num_ranks: int, host_bytes: int | None = None) -> list[str]:
    """A line for each under headings, in GiB per card (host: of the machine).

    `card_bytes` None: of unknown size, so nothing is said about what fits. `host_bytes` None: the host will do.
    """
    rows: list[tuple[str, ...]] = [
        ("", "gradient", "", "gradi-", "opti-", "front", "", "loss", "", "", "", "longest", "host"),
        ("configuration", "ckpt.", "weights", "ents", "mizer", "end", "encoder", "head", "buffers", "sum", "fits",
         "batch", "memory"),
    ]  # fmt: skip
    for need in needs:
        states, activations = need.states, need.activations
        numbers = (
            states.parameters, states.gradients, states.optimizer, activations.front_end, activations.encoder,
            activations.loss_head, states.communication, need.card_bytes,
        )  # fmt: skip
        rows.append(
            (
                need.configuration,
                "yes" if need.gradient_checkpointing else "no",
                *(gib(number) for number in numbers),
                *(("?", "?") if card_bytes is None else _verdict(need, card_bytes, num_ranks, host_bytes)),
                gib(states.host * num_ranks),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(_aligned(row, widths)).rstrip() for row in rows]


def _verdict(need: Need, card_bytes: int, num_ranks: int, host_bytes: int | None) -> tuple[str, str]:
    longest = f"{int(need.largest_seconds):,} s" if need.largest_seconds else "none"
    return "yes" if fits(need, card_bytes) and host_fits(need, num_ranks, host_bytes) else "NO", longest


def _aligned(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    """Names to the left, numbers to the right."""
    return [
        text.ljust(width) if column < 2 else text.rjust(width)
        for column, (text, width) in enumerate(zip(row, widths, strict=True))
    ]


def fits(need: Need, card_bytes: int) -> bool:
    """Whether the micro-batch that was asked for leaves what has to stay free."""
    return need.card_bytes <= usable_bytes(card_bytes)


def host_fits(need: Need, num_ranks: int, host_bytes: int | None) -> bool:
    """Whether the machine has the memory that its ranks take, where it is known."""
    return host_bytes is None or need.states.host * num_ranks <= host_bytes
