"""Recovering the tokens of a small batch from what a client sends, by the span test of DAGER (arXiv 2405.15586).

    python benchmarks/privacy/inversion.py CLINC150-FOLDER

One client takes one step of SGD on 1, 2 or 4 rows and sends its factors. The input x_t of the first layer's query and value is
the embedding of one token at one position, and the step leaves

    ΔA = −lr Bᵀ Σ_t δ_t x_tᵀ          FedIT, from its second round on (B = 0 in the first)
    ΔR = −lr Bᵀ Σ_t δ_t (A x_t)ᵀ      Fed-SB; the same for FedIT's B in its first round, with δ_t in place of Bᵀ δ_t

whose rows lie in the span of the x_t, or of the A x_t. The attacker, who has the base model, tries each token of the
vocabulary at each position: those whose embedding lies in the span were in the batch. A span of k dimensions holds k inputs:
query and value of FedIT have the same inputs, so theirs together show 2 r of them; R shows r − 1, since r of them fill the
space and every token fits. The attacker here is told how many different tokens stand at each position, and takes those that
fit best. The result goes to results/inversion.json.
"""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import setting
from umbel import algebra, wire
from umbel.client import fit, private
from umbel.client.adapter import Adapter
from umbel.client.data import Example
from umbel.client.prompts import pad_id
from umbel.config import Config
from umbel.method import Factors
from umbel.privacy import noise_multiplier
from umbel.record import write_json

CASES = (("fedit", 8), ("fedit", 32), ("fed_sb", 16), ("fed_sb", 64))
BATCHES = (1, 2, 4)
EPSILONS = (8.0, 3.0, 1.0)
CURVE = (1e-7, 1e-6, 1e-5, 1e-4, 1e-3)
MASKED = (3, 10)
ROWS, ROUNDS, DELTA, CLIP = 500, 20, 1e-4, 1.0
"""Of the run that σ is for: a client of 500 rows that sends 20 such steps."""

Table = dict[str, Any]
Truth = dict[int, set[int]]
"""Per position the tokens that stand there, the marks of begin and end left out."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("rows", type=Path, help="folder of CLINC150")
    parser.add_argument("--trials", type=int, default=12)
    arguments = parser.parse_args()
    setting.one_thread()
    result: list[Table] = []
    loaded = setting.Loaded.of(configured(arguments.rows, "fedit", 8))
    for method, rank in CASES:
        attacked = Attacked(loaded, configured(arguments.rows, method, rank))
        for batch in BATCHES:
            for defence in defences(batch):
                found = [attacked.trial(batch, defence, trial) for trial in range(arguments.trials)]
                rates = {key: setting.resampled([x[key] for x in found]) for key in ("recovered", "guessed", "tokens")}
                result.append({"method": method, "rank": rank, "batch": batch, **defence, **rates})
                print(method, rank, batch, defence, rates["recovered"]["mean"], rates["guessed"]["mean"], flush=True)
        attacked.adapter.remove()
    about = {"rows": ROWS, "rounds": ROUNDS, "delta": DELTA, "max_grad_norm": CLIP, "trials": arguments.trials}
    write_json(setting.RESULTS / "inversion.json", {**about, "cases": result, "provenance": loaded.provenance})


def defences(batch: int) -> list[Table]:
    """Returns what stands between the client and the attacker: nothing, another optimizer, dropout, noise, other clients."""
    plain: Table = {"defence": "none", "sigma": 0.0, "clients": 1, "optim": "sgd", "dropout": False}
    spent = [(f"ε = {epsilon:g}", sigma(epsilon, batch)) for epsilon in EPSILONS]
    noise = [*spent, *((f"σ = {x:g}", x) for x in CURVE if batch == 1)]
    return [
        plain,
        {**plain, "defence": "AdamW", "optim": "adamw_torch"},
        {**plain, "defence": "dropout", "dropout": True},
        *({**plain, "defence": f"mean of {clients}", "clients": clients} for clients in MASKED if batch * clients <= 12),
        *({**plain, "defence": name, "sigma": value} for name, value in noise),
    ]


def sigma(epsilon: float, batch: int) -> float:
    """Returns the noise of DP-SGD for a client of ROWS rows that sends ROUNDS steps of so many rows in the mean."""
    return noise_multiplier(epsilon, DELTA, ((batch / ROWS, ROUNDS),))


def configured(rows: Path, method: str, rank: int) -> Config:
    """Returns the configuration of one step."""
    own = {
        "method": {"name": method} | ({"init": "random"} if method == "fed_sb" else {}),
        "lora": {"r": rank, "lora_alpha": rank},
    }
    training = {"learning_rate": 0.1, "max_steps": 1, "max_grad_norm": 0.0, "bf16": False}
    return setting.configured(setting.table(rows, **own, training=training, seed=1))


class Attacked:
    """A client's model in the middle of a run, and the attacker's knowledge of it."""

    def __init__(self, loaded: setting.Loaded, config: Config) -> None:
        self.loaded, self.config = loaded, config
        self.adapter = Adapter(loaded.base.model, config.lora, loaded.base.heads, config.seed)
        self.trains = ("R",) if config.method.name == "fed_sb" else ("A", "B")
        self._begin()
        self.state = self.adapter.state()
        bert: Any = next(m for m in loaded.base.model.modules() if type(m).__name__ == "BertModel")
        self.embeddings = bert.embeddings
        special = set(loaded.base.tokenizer.all_special_ids)
        self.candidates = torch.tensor([i for i in range(self.embeddings.word_embeddings.num_embeddings) if i not in special])
        self.special = special
        self.seen: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}
        # Guessing needs no message: the tokens that stand most often at a position, in rows that are nobody's.
        self.rows = [row for row in loaded.train if len(row.input_ids) < config.data.max_length]
        count = torch.zeros(config.data.max_length, int(self.candidates.max()) + 1)
        for row in loaded.test:
            for position, token in enumerate(row.input_ids):
                count[position, token] += token not in special
        self.usual = count.argsort(dim=1, descending=True)

    def _begin(self) -> None:
        """Puts the adapter where training has begun: orthonormal B and A for Fed-SB; a B that is not zero for FedIT."""
        factors = self.adapter.read()
        for layer, own in factors.items():
            draw = torch.Generator().manual_seed(algebra.seed_of("inversion", layer) % 2**63)
            (m, r), n = own["B"].shape, own["A"].shape[1]
            if self.trains == ("R",):
                B, A = (torch.linalg.qr(torch.randn(size, r, generator=draw))[0] for size in (m, n))
                factors[layer] = {"B": B, "R": torch.zeros(r, r), "A": A.T.contiguous()}
            else:
                factors[layer] = {"A": own["A"], "B": 0.02 * torch.randn(m, r, generator=draw)}
        self.adapter.write(factors)

    def trial(self, batch: int, defence: Table, trial: int) -> Table:
        """Lets clients train on rows of their own, and attacks the mean of what they send.

        Returns:
            Of the tokens to be found: how many, the share recovered, and the share that guessing would have had.
        """
        draw = torch.Generator().manual_seed(algebra.seed_of("trial", batch, trial) % 2**63)
        chosen = torch.randperm(len(self.rows), generator=draw)[: batch * defence["clients"]].tolist()
        rows = [self.rows[i] for i in chosen]
        self.adapter.set_state(*self.state)
        before = self.adapter.read(self.trains)
        after = [self.sent(rows[i : i + batch], defence, trial + i) for i in range(0, len(rows), batch)]
        change = {
            layer: {name: torch.stack([x[layer][name] for x in after]).mean(0) - own[name] for name in self.trains}
            for layer, own in before.items()
        }
        truth = self.truth(rows)
        total = sum(map(len, truth.values()))
        # Begin and end are inputs, too.
        inputs = len({(p, token) for row in rows for p, token in enumerate(row.input_ids)})
        found = self.attack(change, truth, inputs)
        usual = {p: set(self.usual[p, : len(own)].tolist()) for p, own in truth.items()}
        shares = [sum(len(own & guess[p]) for p, own in truth.items()) / total for guess in (found, usual)]
        return {"recovered": shares[0], "guessed": shares[1], "tokens": total}

    def sent(self, rows: list[Example], defence: Table, seed: int) -> dict[str, Factors]:
        """Returns the factors that a client sends after one step on its rows."""
        training = replace(self.config.training, optim=defence["optim"], per_device_train_batch_size=len(rows))
        if defence["optim"] != "sgd":
            training = replace(training, learning_rate=1e-3)
        self.adapter.set_state(*self.state)
        pad = pad_id(self.loaded.base.tokenizer)
        place = (1, 1, {}, lambda step, steps: None)
        with self.dropout(bool(defence["dropout"])):
            if defence["sigma"]:
                noise = private.Noise(defence["sigma"], CLIP, 1.0, algebra.seed_of("secret", defence["defence"], seed))
                private.fit(self.adapter, self.trains, rows, training, pad, noise, *place)
            else:
                fit.fit(self.adapter, self.trains, rows, training, pad, seed, *place)
        # Over the wire and back, as the server has it.
        sent = wire.encode(wire.Message({}, wire.pack_factors(self.adapter.read(self.trains))))
        return wire.unpack_factors(wire.decode(sent).tensors)

    @contextmanager
    def dropout(self, wanted: bool) -> Iterator[None]:
        """Takes the model's own dropout away, as in language models, which have none; or leaves it."""
        modules = {m: m.p for m in self.loaded.base.model.modules() if isinstance(m, nn.Dropout)}
        for module, p in modules.items():
            module.p = p if wanted else 0.0
        yield
        for module, p in modules.items():
            module.p = p

    def truth(self, rows: list[Example]) -> Truth:
        """Returns what is to be found."""
        longest = max(len(row.input_ids) for row in rows)
        found = {p: {row.input_ids[p] for row in rows if p < len(row.input_ids)} - self.special for p in range(longest)}
        return {p: tokens for p, tokens in found.items() if tokens}

    def attack(self, change: dict[str, Factors], truth: Truth, inputs: int) -> Truth:
        """Returns per position the tokens whose embeddings are nearest to the span, as many as there are."""
        spans = self.spans(change, inputs)
        found: Truth = {}
        for position, tokens in truth.items():
            # Relative distance to each span, all of them counted.
            distance = torch.zeros(len(self.candidates))
            for layer, basis in spans:
                x, norms = self.inputs(position, layer)
                distance += (1 - (x @ basis).square().sum(1) / norms).clamp(min=0)
            found[position] = set(self.candidates[distance.topk(len(tokens), largest=False).indices].tolist())
        return found

    def spans(self, change: dict[str, Factors], inputs: int) -> list[tuple[str, Tensor]]:
        """Returns (the layer through whose A embeddings are seen, "" for as they are; a basis of the span)."""
        first = [layer for layer in change if ".layer.0." in f".{layer}."]
        if self.trains == ("R",):
            return [(layer, basis_of(change[layer]["R"], inputs, 1)) for layer in first]
        return [("", basis_of(torch.cat([change[layer]["A"] for layer in first]), inputs, 0))]

    @torch.no_grad()
    def inputs(self, position: int, layer: str) -> tuple[Tensor, Tensor]:
        """Returns what the first layer reads where a candidate stands at a position, seen through A, and its squared norm."""
        known = self.seen.get((position, layer))
        if known is None:
            self.embeddings.eval()
            at = torch.full((len(self.candidates), 1), position)
            x = self.embeddings(input_ids=self.candidates[:, None], position_ids=at)[:, 0]
            x = x @ self.adapter.read(("A",))[layer]["A"].T if layer else x
            known = self.seen[position, layer] = (x, x.square().sum(1))
        return known


def basis_of(matrix: Tensor, inputs: int, spare: int) -> Tensor:
    """Returns an orthonormal basis, columns, of the leading row space: as many directions as inputs, or as there can be.

    Args:
        matrix: k × d.
        inputs: Vectors that span it.
        spare: Directions to leave out, so that a full space does not hold everything.
    """
    rank = min(inputs, matrix.shape[0] - spare)
    return torch.linalg.svd(matrix.double(), full_matrices=False)[2][:rank].T.float()


if __name__ == "__main__":
    main()
