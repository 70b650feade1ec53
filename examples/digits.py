"""Trains a small dilated neighborhood attention transformer on scikit-learn's handwritten digits (8 x 8 pixels).

Every pixel is a token. Blocks alternate plain and dilated 3 x 3 windows, as in Dilated Neighborhood Attention
Transformer (Hassani and Shi, 2022). A stratified split keeps 20 % of the 1,797 images for the test; split, initial
weights and the order of the batches are fixed by --seed. The program ends with an error below 97 % test accuracy.

    python examples/digits.py [--epochs 20] [--seed 0] [--picture build/windows.png]
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import natten
import windows

REQUIRED_ACCURACY = 0.97
BATCH_SIZE = 64
EMBED_DIM = 48
NUM_HEADS = 3
DILATIONS = (1, 2, 1, 2)


class Block(nn.Module):
    """Pre-norm transformer block with neighborhood attention, [B, X, Y, C] in and out."""

    def __init__(self, embed_dim: int, num_heads: int, dilation: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(embed_dim)
        self.attention = natten.NeighborhoodAttention2D(embed_dim, num_heads, kernel_size=3, dilation=dilation)
        self.mlp = nn.Sequential(
            nn.LayerNorm(embed_dim), nn.Linear(embed_dim, 2 * embed_dim), nn.GELU(), nn.Linear(2 * embed_dim, embed_dim)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(x)


class DigitClassifier(nn.Module):
    """Images [B, 8, 8] to logits [B, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, EMBED_DIM, kernel_size=3, padding=1)
        self.position = nn.Parameter(0.1 * torch.randn(8, 8, EMBED_DIM))
        self.blocks = nn.Sequential(*(Block(EMBED_DIM, NUM_HEADS, dilation) for dilation in DILATIONS))
        self.norm = nn.LayerNorm(EMBED_DIM)
        self.head = nn.Linear(EMBED_DIM, 10)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.embed(images[:, None]).permute(0, 2, 3, 1)  # [B, X, Y, C]
        tokens = self.blocks(tokens + self.position)
        return self.head(self.norm(tokens).mean(dim=(1, 2)))


def load_split(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images, test images, training labels, test labels."""
    images, labels = load_digits(return_X_y=True)
    split = train_test_split(images.reshape(-1, 8, 8), labels, test_size=0.2, stratify=labels, random_state=seed)
    train_images, test_images, train_labels, test_labels = map(torch.from_numpy, split)
    return train_images.float() / 16, test_images.float() / 16, train_labels, test_labels


def shift_randomly(images: Tensor) -> Tensor:
    """Moves every image by -1, 0 or 1 pixels along each axis, filling with background."""
    padded = F.pad(images, (1, 1, 1, 1))
    patches = padded.unfold(1, 8, 1).unfold(2, 8, 1)  # [B, 3, 3, 8, 8]
    shift = torch.randint(0, 3, (2, len(images)))
    return patches[torch.arange(len(images)), shift[0], shift[1]]


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int) -> None:
    steps = epochs * -(-len(images) // BATCH_SIZE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps, pct_start=0.2)
    model.train()
    with tqdm(total=steps, desc="training", unit="step", smoothing=0.05) as progress:
        for epoch in range(epochs):
            for batch in torch.randperm(len(images)).split(BATCH_SIZE):
                loss = F.cross_entropy(model(shift_randomly(images[batch])), labels[batch], label_smoothing=0.05)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                progress.update()
            progress.set_postfix(epoch=epoch + 1, loss=f"{loss.item():.3f}")


def explain_layers(model: nn.Module) -> dict[str, list[str]]:
    """What natten.explain says of a training step, and the attention layers of which it says so."""
    result: dict[str, list[str]] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, natten.NeighborhoodAttention2D):
            shape = (BATCH_SIZE, 8, 8, layer.num_heads, layer.head_dim)
            explanation = natten.explain(
                shape, shape, shape, layer.kernel_size, dilation=layer.dilation, device="cpu", requires_grad=True
            )
            result.setdefault(str(explanation), []).append(name)
    return result


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    model.eval()
    return (model(images).argmax(dim=-1) == labels).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--picture", type=Path, default=Path("build/windows.png"), help="where to write the picture of windows"
    )
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    train_images, test_images, train_labels, test_labels = load_split(options.seed)
    model = DigitClassifier()
    console = Console()
    for explanation, layers in explain_layers(model).items():
        console.rule(", ".join(layers), align="left")
        print(explanation, end="\n\n")

    started = time.perf_counter()
    train(model, train_images, train_labels, options.epochs)
    seconds = time.perf_counter() - started
    reached = accuracy(model, test_images, test_labels)

    table = Table(title="Handwritten digits, dilated neighborhood attention", show_header=False)
    table.add_row("images for training / test", f"{len(train_images)} / {len(test_images)}, seed {options.seed}")
    table.add_row("parameters", f"{sum(p.numel() for p in model.parameters()):,}")
    table.add_row("training", f"{options.epochs} epochs in {seconds:.0f} s on {torch.get_num_threads()} CPU threads")
    table.add_row("test accuracy", f"{reached:.2%} (required: {REQUIRED_ACCURACY:.0%})")
    console.print(table)

    windows.draw(options.picture)
    console.print(f"windows and attention of one query of a photograph: {options.picture}")
    if reached < REQUIRED_ACCURACY:
        sys.exit(f"test accuracy {reached:.2%} is below {REQUIRED_ACCURACY:.0%}")


if __name__ == "__main__":
    main()
