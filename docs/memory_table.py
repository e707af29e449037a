"""Prints the memory table of docs/cluster.md: what the formula there gives, computed and not measured."""

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Model:
    name: str
    parameters: float
    vocabulary: int
    hidden: int
    layers: int
    tied: bool  # embedding and head are one matrix
    adapter: float  # weights of LoRA of rank 16 on all linear layers

    @property
    def head(self) -> float:
        return self.vocabulary * self.hidden

    @property
    def ends(self) -> float:
        return self.head * (1 if self.tied else 2)

    @property
    def layer(self) -> float:
        return (self.parameters - self.ends) / self.layers


MODELS = [
    Model("1B (Llama 3.2)", 1.24e9, 128_256, 2048, 16, True, 11.3e6),
    Model("8B (Llama 3.1)", 8.03e9, 128_256, 4096, 32, False, 41.9e6),
    Model("70B (Llama 3.1)", 70.6e9, 128_256, 8192, 80, False, 207e6),
]
GPUS = (2, 4, 8, 16, 32, 64)


def ddp(m: Model, full: bool) -> float:
    return (16 + 2) * m.parameters + 6 * m.head if full else 2 * m.parameters + 16 * m.adapter


def fsdp(m: Model, full: bool, gpus: int) -> float:
    kept = 16 * m.parameters if full else 2 * m.parameters + 16 * m.adapter
    gathered = 2 * m.ends + 2 * 2 * m.layer
    return kept / gpus + gathered + (6 * m.head + 6 * m.layer if full else 0)


def main() -> None:
    columns = ["model", "trained", "1 GPU, or DDP", *(f"FSDP2 × {n}" for n in GPUS)]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for m in MODELS:
        for full in (False, True):
            sizes = [ddp(m, full), *(fsdp(m, full, n) for n in GPUS)]
            cells = (f"{size / GIB:,.0f}" if size > 10 * GIB else f"{size / GIB:.1f}" for size in sizes)
            print(f"| {m.name} | {'all weights' if full else 'LoRA'} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
