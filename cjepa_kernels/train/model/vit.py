"""Vision transformer with a CLS token, and the predictor of a joint-embedding architecture."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cjepa_kernels.train.config import MOST_PATCHES, ModelConfig

_POSITION_BASE = 100.0
_TOKEN_STD = 0.02


class VisionTransformer(nn.Module):
    """Encodes the visible patches of an image, or all of them.

    Args:
        config: Sizes.
        image_shape: Channels, height and width; the patch size must divide height and width.
        channel_mean: (C,) fp32, mean of each channel on the scale [0, 1].
        channel_std: (C,) fp32, standard deviation of each channel.

    Raises:
        ValueError: If the patch size does not divide the image.

    Source:
        Dosovitskiy et al., "An image is worth 16x16 words", arXiv 2010.11929.
    """

    positions: Tensor
    channel_mean: Tensor
    channel_std: Tensor

    def __init__(
        self,
        config: ModelConfig,
        image_shape: tuple[int, int, int],
        channel_mean: Tensor,
        channel_std: Tensor,
    ) -> None:
        super().__init__()
        channels = image_shape[0]
        self.patch_size = config.patch_size
        self.grid = patch_grid(config.patch_size, image_shape)
        self.embedding = nn.Linear(channels * config.patch_size**2, config.dim)
        self.cls_token = nn.Parameter(torch.randn(1, 1, config.dim) * _TOKEN_STD)
        self.blocks = nn.ModuleList(
            TransformerBlock(config.dim, config.heads, config.mlp_ratio)
            for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(config.dim)
        self.register_buffer(
            "positions", sine_cosine_positions(self.grid, config.dim, config.position_scale)
        )
        self.register_buffer("channel_mean", channel_mean.view(1, -1, 1, 1).clone())
        self.register_buffer("channel_std", channel_std.view(1, -1, 1, 1).clone())
        self.apply(_initialise)
        # Normalised pixels have unit variance. These weights give embedded patches unit variance
        # too, which is the scale that model.position_scale refers to.
        nn.init.normal_(self.embedding.weight, std=self.embedding.in_features**-0.5)

    def forward(
        self, images: Tensor, visible: Tensor | None = None, wanted: Tensor | None = None
    ) -> Tensor:
        """Encode images.

        Args:
            images: (B, C, H, W) float in [0, 1].
            visible: (B, K) int64, the patches to encode; None: all of them.
            wanted: (B, M) int64, positions among the encoded patches of those to return; None:
                CLS and all of them.

        Returns:
            (B, K + 1, D), the CLS token first; or (B, M, D) without CLS if ``wanted`` is given.
        """
        normalised = (images - self.channel_mean) / self.channel_std
        patches = patchify(normalised, self.patch_size)  # (B, N, C P P)
        positions = self.positions  # (N, D)
        if visible is not None:
            patches, positions = take_tokens(patches, visible), positions[visible]
        tokens = self.embedding(patches) + positions
        tokens = torch.cat([self.cls_token.to(tokens.dtype).expand(len(tokens), -1, -1), tokens], 1)
        for block in self.blocks[:-1]:
            tokens = block(tokens)
        outputs = None if wanted is None else take_tokens(tokens, wanted + 1)
        return self.norm(self.blocks[-1](tokens, outputs))  # type: ignore[no-any-return]


class Predictor(nn.Module):
    """Predicts the features of hidden patches from those of the visible ones, per level.

    Args:
        config: Sizes.
        grid: Rows and columns of patches.
        levels: Number of hierarchy levels; each has a linear head of its own.
    """

    positions: Tensor

    def __init__(self, config: ModelConfig, grid: tuple[int, int], levels: int) -> None:
        super().__init__()
        width = config.predictor_dim
        self.embedding = nn.Linear(config.dim, width)
        self.mask_token = nn.Parameter(torch.randn(1, 1, width) * _TOKEN_STD)
        self.blocks = nn.ModuleList(
            TransformerBlock(width, config.predictor_heads, config.mlp_ratio)
            for _ in range(config.predictor_depth)
        )
        self.norm = nn.LayerNorm(width)
        self.heads = nn.ModuleList(nn.Linear(width, config.dim) for _ in range(levels))
        self.register_buffer("positions", sine_cosine_positions(grid, width, config.position_scale))
        self.apply(_initialise)

    def forward(self, context: Tensor, visible: Tensor, predicted: Tensor) -> list[Tensor]:
        """Predict.

        Args:
            context: (B, K + 1, D) from the context encoder; its CLS token is not used.
            visible: (B, K) int64, the patches in the context.
            predicted: (B, M) int64, the patches to predict.

        Returns:
            One (B, M // 2^l, D) tensor per level l.
        """
        seen = self.embedding(context[:, 1:])
        seen = seen + self.positions[visible]
        hidden = (self.mask_token + self.positions[predicted]).to(seen.dtype)
        tokens = torch.cat([seen, hidden], dim=1)
        for block in self.blocks[:-1]:
            tokens = block(tokens)
        count = predicted.shape[1]
        tokens = self.norm(self.blocks[-1](tokens, tokens[:, -count:]))
        return [head(pool_tokens(tokens, level)) for level, head in enumerate(self.heads)]


class TransformerBlock(nn.Module):
    """Pre-norm self-attention and MLP.

    Args:
        dim: Width.
        heads: Attention heads; must divide ``dim``.
        mlp_ratio: Width of the hidden layer in units of ``dim``.
    """

    def __init__(self, dim: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        hidden = round(dim * mlp_ratio)
        self.heads = heads
        self.attention_norm = nn.LayerNorm(dim)
        self.query_key_value = nn.Linear(dim, 3 * dim)
        self.attention_output = nn.Linear(dim, dim)
        self.mlp_norm = nn.LayerNorm(dim)
        self.mlp_input = nn.Linear(dim, hidden)
        self.mlp_output = nn.Linear(hidden, dim)

    def forward(self, tokens: Tensor, wanted: Tensor | None = None) -> Tensor:
        """Transform tokens.

        Args:
            tokens: (B, N, D), the tokens to attend to.
            wanted: (B, M, D), the tokens among them whose outputs are returned; None: all of them.
                For the other tokens only keys and values are computed.

        Returns:
            (B, N, D), or (B, M, D) with ``wanted``.
        """
        batch, _, dim = tokens.shape
        if wanted is None:
            packed = self.query_key_value(self.attention_norm(tokens))
            query, key, value = packed.view(batch, -1, 3, self.heads, dim // self.heads).unbind(2)
            wanted = tokens
        else:
            weight, bias = self.query_key_value.weight, self.query_key_value.bias
            query = F.linear(self.attention_norm(wanted), weight[:dim], bias[:dim])
            query = query.view(batch, -1, self.heads, dim // self.heads)
            packed = F.linear(self.attention_norm(tokens), weight[dim:], bias[dim:])
            key, value = packed.view(batch, -1, 2, self.heads, dim // self.heads).unbind(2)
        attended = F.scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        )
        wanted = wanted + self.attention_output(attended.transpose(1, 2).reshape(wanted.shape))
        hidden = F.gelu(self.mlp_input(self.mlp_norm(wanted)))
        return wanted + self.mlp_output(hidden)  # type: ignore[no-any-return]


def patch_grid(patch_size: int, image_shape: tuple[int, int, int]) -> tuple[int, int]:
    """Number of patches down and across.

    Args:
        patch_size: Side of a patch in pixels.
        image_shape: Channels, height and width.

    Returns:
        Rows and columns of patches.

    Raises:
        ValueError: If the patch size does not divide height and width, or gives too many patches.
    """
    _, height, width = image_shape
    if height % patch_size or width % patch_size:
        raise ValueError(
            f"model.patch_size: expected a divisor of the images' {height} x {width} pixels, "
            f"got {patch_size}"
        )
    rows, columns = height // patch_size, width // patch_size
    if rows * columns > MOST_PATCHES:
        raise ValueError(
            f"model.patch_size: expected at most {MOST_PATCHES:,} patches an image, got "
            f"{rows} x {columns} of {patch_size} pixels"
        )
    return rows, columns


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Cut images into patches.

    Args:
        images: (B, C, H, W).
        patch_size: Side P of a patch in pixels.

    Returns:
        (B, N, C P P), patches row by row.
    """
    batch, channels, height, width = images.shape
    rows, columns = height // patch_size, width // patch_size
    split = images.view(batch, channels, rows, patch_size, columns, patch_size)
    return split.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, -1)


def take_tokens(tokens: Tensor, indices: Tensor) -> Tensor:
    """Select tokens of each sample.

    Args:
        tokens: (B, N, D).
        indices: (B, K) int64.

    Returns:
        (B, K, D).
    """
    return tokens.gather(1, indices[..., None].expand(-1, -1, tokens.shape[-1]))


def pool_tokens(tokens: Tensor, level: int) -> Tensor:
    """Average runs of 2^level tokens along the sequence.

    Args:
        tokens: (B, M, D).
        level: Hierarchy level, from 0.

    Returns:
        (B, M // 2^level, D); a rest that fills no run is dropped.
    """
    run = 2**level
    if run == 1:
        return tokens
    batch, count, dim = tokens.shape
    runs = count // run
    return tokens[:, : runs * run].reshape(batch, runs, run, dim).mean(dim=2)


def sine_cosine_positions(grid: tuple[int, int], dim: int, scale: float) -> Tensor:
    """Two-dimensional sine-cosine positions, centred and scaled.

    The raw table has a large constant part, which attention adds to CLS in the same way for every
    image. The cosine between any two CLS tokens would then start near 1, and the contrastive term
    would learn nothing.

    Args:
        grid: Rows and columns of patches.
        dim: Width, a multiple of 4.
        scale: Standard deviation of the returned table.

    Returns:
        (rows * columns, dim) fp32, of mean 0 over the positions.
    """
    rows, columns = grid
    frequencies = _POSITION_BASE ** -(torch.arange(dim // 4) / (dim / 4))
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    row_angle = row.flatten()[:, None] * frequencies
    column_angle = column.flatten()[:, None] * frequencies
    table = torch.cat(
        [row_angle.sin(), row_angle.cos(), column_angle.sin(), column_angle.cos()], dim=1
    )
    centred = table - table.mean(dim=0)
    deviation = centred.std() if len(table) > 1 else centred.new_ones(())
    return centred / deviation.clamp_min(1e-6) * scale


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
