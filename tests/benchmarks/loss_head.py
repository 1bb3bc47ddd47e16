"""What the loss head costs in time and memory, stock transformers' and ours side by side in one process.

    python tests/benchmarks/loss_head.py [--output FILE.md] [--batch_size 4 --num_frames 937 ...]

The head is everything after the encoder: taking the masked frames (ours), project_hid, dropout, quantizer, project_q,
contrastive and diversity loss. Both models run their real `forward`; only `wav2vec2` is replaced, by a stand-in that
returns a given encoder output and given features. Sizes other than those in the flags are the large recipe's; fp32. At
the default size it needs 12 GB and three minutes on two cores, nearly all of it stock's. Run it on an idle machine:
under load our short steps lose more than stock's long ones.
"""

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast
from unittest.mock import patch

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from transformers import Wav2Vec2Config, Wav2Vec2ForPreTraining
from transformers.modeling_outputs import BaseModelOutput, Wav2Vec2BaseModelOutput

from tests.benchmarks.live_memory import LiveMemory
from trainer.data.collate import Batch, MaskSettings, collate
from trainer.data.frames import WAV2VEC2_GEOMETRY
from trainer.model.objective import perplexity, quantize
from trainer.model.pretraining import PretrainingModel, build_model
from trainer.model.sizes import SIZES

TEMPERATURE = 2.0  # of the Gumbel softmax: where the recipes start

MIN_SPEEDUP = 80.0
MIN_HEAD_MEMORY_RATIO = 20.0
MIN_QUANTIZER_MEMORY_RATIO = 5.0
MAX_DIFFERENCE = 1e-5


class Size(NamedTuple):
    """B utterances of T frames, K negatives per masked frame, contrasted in D dimensions."""

    batch_size: int = 4
    num_frames: int = 937
    num_negatives: int = 100
    dim: int = 768


class Inputs(nn.Module):
    """What the head reads, as leaves: the encoder's output `[B, T, H]` and the layer-normed features `[B, T, C]`."""

    def __init__(self, encoded: Tensor, features: Tensor) -> None:
        super().__init__()
        self.encoded = nn.Parameter(encoded)
        self.features = nn.Parameter(features)


class StockEncoder(Inputs):
    """Stands in for `Wav2Vec2Model` in transformers' model."""

    def forward(self, input_values: Tensor, **_: Any) -> Wav2Vec2BaseModelOutput:
        return Wav2Vec2BaseModelOutput(last_hidden_state=self.encoded, extract_features=self.features)


class OurEncoder(Inputs):
    """Stands in for `Wav2Vec2Model` in our model, which calls its parts. What precedes the encoder is 1 wide."""

    def __init__(self, encoded: Tensor, features: Tensor) -> None:
        super().__init__(encoded, features)
        self.masked_spec_embed = torch.zeros(1)
        self.feature_extractor = nn.Identity()
        self.feature_extractor.register_parameter("dtype", nn.Parameter(torch.zeros(1)))  # its type is asked for
        # as plain attributes: modules would list the leaves a second time
        self.feature_projection = lambda waveform: (waveform, self.features)
        self.encoder = lambda hidden_states, **_: BaseModelOutput(last_hidden_state=self.encoded)


class Side(NamedTuple):
    """A model and its head's loss. Its leaves are the head's parameters and the two inputs."""

    model: Wav2Vec2ForPreTraining | PretrainingModel
    inputs: Inputs
    loss: Callable[[], Tensor]

    def step(self) -> float:
        """Forward and backward from no gradients at all; returns the loss."""
        self.model.zero_grad(set_to_none=True)
        loss = self.loss()
        loss.backward()
        return loss.item()

    def gradients(self) -> dict[str, Tensor]:
        return {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}


class Case(NamedTuple):
    """The same weights, inputs, masks and negatives on both sides."""

    stock: Side
    ours: Side
    batch: Batch


def build_case(size: Size, seed: int = 0) -> Case:
    settings = {"proj_codevector_dim": size.dim, "codevector_dim": size.dim, "num_negatives": size.num_negatives}
    config = Wav2Vec2Config(**{**SIZES["large"], **settings, "num_hidden_layers": 0})
    batch = _batch(config, size, seed)
    ours = build_model(config, seed=seed)
    stock = Wav2Vec2ForPreTraining(config)
    stock.load_state_dict(ours.state_dict())
    stock.set_gumbel_temperature(cast(int, TEMPERATURE))

    encoded = torch.randn(*batch.mask.shape, config.hidden_size)
    features = nn.functional.layer_norm(torch.randn(size.num_frames // 3, config.conv_dim[-1]), config.conv_dim[-1:])
    # each occurs about three times in a row, so that some negatives share the positive's codeword and are left out
    features = features[torch.randint(len(features), batch.mask.shape)]  # [B, T, C]
    stock_inputs, our_inputs = StockEncoder(encoded.clone(), features.clone()), OurEncoder(encoded, features)
    stock.register_module("wav2vec2", stock_inputs)
    ours.register_module("wav2vec2", our_inputs)
    stock_negatives = _negatives_for_stock(batch)
    nothing = torch.zeros(*batch.mask.shape, 1)  # in place of waveforms

    def stock_loss() -> Tensor:
        output = stock(nothing, mask_time_indices=batch.mask, sampled_negative_indices=stock_negatives)
        return cast(Tensor, output.loss)

    def our_loss() -> Tensor:
        terms = ours(
            nothing.transpose(1, 2),
            batch.mask,
            batch.target_frames,
            batch.target_valid,
            batch.negatives,
            gumbel_temperature=TEMPERATURE,
        )
        return cast(Tensor, terms.loss)

    stock.train()
    ours.train()
    return Case(Side(stock, stock_inputs, stock_loss), Side(ours, our_inputs, our_loss), batch)


def _batch(config: Wav2Vec2Config, size: Size, seed: int) -> Batch:
    """Masks and negatives as training draws them."""
    waveform = np.zeros(WAV2VEC2_GEOMETRY.min_samples(size.num_frames), dtype=np.float32)
    masks = MaskSettings(config.mask_time_prob, config.mask_time_length, size.num_negatives)
    return collate([waveform] * size.batch_size, range(size.batch_size), 0, seed, WAV2VEC2_GEOMETRY, masks)


def _negatives_for_stock(batch: Batch) -> Tensor:
    """Our negatives in stock's terms: for every frame, masked or not, flat positions in B x T. `[B, T, K]`"""
    num_frames = batch.mask.shape[1]
    negatives = torch.zeros(*batch.mask.shape, batch.negatives.shape[-1], dtype=torch.long)
    for row, valid in enumerate(batch.target_valid):
        frames = batch.target_frames[row, valid].long()
        negatives[row, frames] = frames[batch.negatives[row, valid].long()] + row * num_frames
    return negatives


@contextmanager
def no_gumbel_noise() -> Iterator[None]:
    """Gumbel noise is drawn, at its full cost, and set to -ln 1 = 0: stock draws for more frames than we do."""
    draw = torch.Tensor.exponential_

    def draw_and_set(self: Tensor) -> Tensor:
        return draw(self).fill_(1.0)

    with patch.object(torch.Tensor, "exponential_", draw_and_set):
        yield


def peak_bytes(run: Callable[[], object]) -> int:
    memory = LiveMemory()
    with memory:
        run()
    return memory.peak_bytes


def relative_difference(value: Tensor, reference: Tensor) -> float:
    """Norm of the difference over norm of the reference. Biases show the most: sums of terms that nearly cancel."""
    value, reference = value.detach().double(), reference.detach().double()
    return float((value - reference).norm() / reference.norm())


def compare(case: Case) -> tuple[tuple[int, int], dict[str, float]]:
    """One step of each side: peak bytes (stock, ours), and relative differences of the loss and of every gradient."""
    losses: list[float] = []
    peaks = []
    for side in (case.stock, case.ours):
        side.model.zero_grad(set_to_none=True)
        peaks.append(peak_bytes(lambda side=side: losses.append(side.step())))  # type: ignore[misc]
    wanted, got = case.stock.gradients(), case.ours.gradients()
    if wanted.keys() != got.keys():
        raise ValueError(f"gradients exist on one side only: {sorted(wanted.keys() ^ got.keys())}.")
    differences = {"loss": abs(losses[1] - losses[0]) / abs(losses[0])}
    whole = [torch.cat([gradients[name].detach().flatten() for name in wanted]) for gradients in (got, wanted)]
    differences["whole gradient"] = relative_difference(*whole)
    differences |= {name: relative_difference(got[name], gradient) for name, gradient in wanted.items()}
    return (peaks[0], peaks[1]), differences


def time_steps(case: Case, num_rounds: int, num_ours: int) -> tuple[list[float], list[float]]:
    """Seconds of forward + backward of stock and ours; in each round stock once, then ours `num_ours` times."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(num_rounds):
        for side, times, num_steps in zip((case.stock, case.ours), seconds, (1, num_ours), strict=True):
            for _ in range(num_steps):
                side.model.zero_grad(set_to_none=True)
                start = time.perf_counter()
                side.step()
                times.append(time.perf_counter() - start)
    return seconds


def quantizer_peaks(case: Case, *, same_frames: bool) -> tuple[int, int]:
    """Peak bytes of the quantizers alone (stock, ours), forward + backward.

    In training stock quantizes every frame and ours the masked ones. With `same_frames` both get the masked ones.
    """
    features, frames, valid = case.stock.inputs.features.detach(), case.batch.target_frames, case.batch.target_valid
    mask = case.batch.mask
    if same_frames:
        features = features[mask].unsqueeze(0)  # [1, N, C]
        mask = valid = torch.ones(features.shape[:2], dtype=torch.bool)
        frames = torch.arange(features.shape[1]).unsqueeze(0)
    stock_gradient = torch.randn(*mask.shape, case.stock.model.config.codevector_dim) * mask.unsqueeze(-1)
    our_gradient = _take(stock_gradient, frames) * valid.unsqueeze(-1)

    def run_stock() -> None:
        vectors, prob_perplexity = case.stock.model.quantizer(features, mask)
        torch.autograd.backward([vectors, prob_perplexity], [stock_gradient, torch.ones(())])

    def run_ours() -> None:
        vectors, prob_perplexity = _our_quantizer(
            cast(PretrainingModel, case.ours.model), _take(features, frames), valid
        )
        torch.autograd.backward([vectors, prob_perplexity], [our_gradient.flatten(0, 1), torch.ones(())])

    features.requires_grad_()
    peaks = []
    gradients = []
    for side, run in ((case.stock, run_stock), (case.ours, run_ours)):
        side.model.zero_grad(set_to_none=True)
        features.grad = None
        peaks.append(peak_bytes(run))
        gradients.append({**side.gradients(), "features": cast(Tensor, features.grad)})
    for name, gradient in gradients[0].items():
        difference = relative_difference(gradients[1][name], gradient)
        if not difference <= MAX_DIFFERENCE:
            raise ValueError(f"the quantizers differ by {difference:.1e} in the gradient of {name}: not the same work.")
    return peaks[0], peaks[1]


def _our_quantizer(model: PretrainingModel, candidates: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """The quantizer as `PretrainingModel` uses it: chosen vectors `[B x M, G x d]` and the softmax's perplexity."""
    quantizer = model.quantizer
    num_groups, num_vars = quantizer.num_groups, quantizer.num_vars
    quantized = quantize(
        quantizer.weight_proj(candidates).view(-1, num_groups, num_vars),
        quantizer.codevectors.view(num_groups, num_vars, -1),
        valid.reshape(-1),
        TEMPERATURE,
    )
    prob_perplexity, _ = perplexity(quantized.usage, valid.sum().float())
    return quantized.vectors, prob_perplexity


def _take(sequence: Tensor, frames: Tensor) -> Tensor:
    """Rows of `sequence` `[B, T, C]` at `frames` `[B, M]` -> `[B, M, C]`."""
    return sequence.gather(1, frames.long().unsqueeze(-1).expand(-1, -1, sequence.shape[-1]))


def report(size: Size, num_rounds: int, num_ours: int) -> str:
    """Measure all there is and tell it in Markdown."""
    environment = _environment()
    case = build_case(size)
    with no_gumbel_noise():
        head, differences = compare(case)  # also the warm-up
        stock_seconds, our_seconds = time_steps(case, num_rounds, num_ours)
        gradients = sum(gradient.nbytes for gradient in case.ours.gradients().values())
        quantizers = [quantizer_peaks(case, same_frames=same) for same in (False, True)]
    return "\n".join(
        [
            "# The loss head: stock transformers and ours",
            "",
            f"`{_command(size)}`: B={size.batch_size}, T={size.num_frames}, K={size.num_negatives}, D={size.dim}, "
            f"{case.batch.num_targets} masked frames, fp32, Gumbel noise drawn and set to zero.",
            "",
            environment,
            "",
            "| Forward + backward | stock | ours | stock / ours | promised |",
            "|---|--:|--:|--:|--:|",
            _time_row("head, median time", statistics.median(stock_seconds), statistics.median(our_seconds)),
            _time_row("head, shortest time", min(stock_seconds), min(our_seconds)),
            _memory_row("head, peak extra memory", head, MIN_HEAD_MEMORY_RATIO),
            _memory_row("quantizer, peak extra memory", quantizers[0], MIN_QUANTIZER_MEMORY_RATIO),
            _memory_row("quantizer, both given the masked frames only", quantizers[1], MIN_QUANTIZER_MEMORY_RATIO),
            "",
            f"Seconds in the order taken: stock {_list(stock_seconds)}; ours {_list(our_seconds)}. Memory: bytes of "
            "the tensors alive at once on top of weights and inputs (`live_memory.py`). Gradients of the head's "
            f"parameters and of both inputs, {gradients / 1e6:.1f} MB, are in it on either side.",
            "",
            f"| Relative difference, each against its own norm; {MAX_DIFFERENCE:.0e} promised | |",
            "|---|--:|",
            *(f"| {name} | {difference:.1e} |" for name, difference in differences.items()),
            "",
            "The gradient of a projection's bias is a sum that nearly cancels, so fp32 shows there the most, in stock "
            "as in ours; in fp64 all agree to 1e-12 (`tests/unit/model/test_head_cost.py`).",
            "",
        ]
    )


def _command(size: Size) -> str:
    changed = [f" --{name} {value}" for name, value in size._asdict().items() if value != Size._field_defaults[name]]
    return "python tests/benchmarks/loss_head.py" + "".join(changed)


def _time_row(name: str, stock: float, ours: float) -> str:
    return f"| {name} | {stock:.2f} s | {ours:.3f} s | {stock / ours:.1f} | at least {MIN_SPEEDUP:.0f} |"


def _memory_row(name: str, peaks: tuple[int, int], promised: float) -> str:
    stock, ours = peaks
    return f"| {name} | {stock / 1e6:,.1f} MB | {ours / 1e6:,.1f} MB | {stock / ours:.1f} | at least {promised:.0f} |"


def _list(times: list[float]) -> str:
    return ", ".join(f"{seconds:.3g}" for seconds in times)


def _environment() -> str:
    cpu_info = Path("/proc/cpuinfo")
    lines = cpu_info.read_text().splitlines() if cpu_info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return (
        f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, "
        f"load before {os.getloadavg()[0]:.1f}; Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and memory of the loss head, stock transformers' and ours.")
    for name, default in Size._field_defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    parser.add_argument("--num_rounds", type=int, default=2, help="timed steps of stock; default 2")
    parser.add_argument("--num_ours", type=int, default=5, help="timed steps of ours after each of stock; default 5")
    parser.add_argument("--output", type=Path, help="Markdown file to write as well")
    arguments = vars(parser.parse_args())
    size = Size(**{name: arguments[name] for name in Size._fields})
    text = report(size, arguments["num_rounds"], arguments["num_ours"])
    print(text)
    if arguments["output"]:
        arguments["output"].write_text(text)


if __name__ == "__main__":
    main()
