"""The denoiser: a U-Net that predicts the noise in a latent, cross-attending to concept tokens.

WHERE     Read after encdiff.py, before vq.py. Imports torch only; copy it freely.
PAPER     arXiv 2402.09712, Sec. 3.1 ("Diffusion Model with Cross Attention"), Appendix D (Table 7);
          blocks: latent diffusion (Rombach et al. 2022) and ADM (Dhariwal & Nichol 2021).
SHAPES    B batch, N concept tokens, d token width, c channels, h x w latent grid, P = h*w
          positions, H heads, e = c/H channels of one head, E width of the time embedding.
IDEA      A query is a position of the latent image; keys and values are the N concept tokens. At
          each position the softmax over the tokens makes the concepts compete, so a token gains by
          owning what is drawn in some region and staying out elsewhere. The image has no other way
          in: what the tokens do not tell, the denoiser has to guess from z_t. Output projections
          start at zero, so each block begins as the identity and the untrained network predicts 0,
          the mean of the noise. Two such zeros follow each other: the tokens get no gradient in the
          first two steps, as is to be expected.
DIFFERS   With its defaults in no layer: 37,469,635 parameters at the d = 16 of the authors' code
          (paper: 32). Attention is written out: torch's fused one has a slow backward pass on CPUs.
          `small` and `large` drop skip features and learn positions in place of self-attention.
TRY       python unet.py   ->   parameters, shapes, and an attention map whose rows sum to 1
"""
import contextlib
import math

import torch
import torch.nn as nn
import torch.nn.functional as F


def timestep_embedding(t, width):
    """Sinusoids of t, as in "Attention Is All You Need": t (B,) -> (B, width) float32."""
    half = width // 2
    # Wavelengths from 2 pi to (width 64) 2 pi * 7,499: near timesteps and far ones are told apart.
    frequencies = torch.exp(-math.log(10_000) * torch.arange(half, device=t.device) / half)
    angles = t[:, None].float() * frequencies  # (B,) -> (B, half)
    return torch.cat([angles.cos(), angles.sin()], dim=1)  # (B, width)


def group_norm(channels, eps=1e-5):
    """GroupNorm of at most 32 groups, each of two channels or more: 48 channels give 8 groups."""
    # The norm takes each group's mean away: a channel alone in its group could not carry one.
    return nn.GroupNorm(math.gcd(32, channels // 2), channels, eps=eps)


def zero(layer):
    """The layer with its parameters set to zero: the residual branch that it ends starts silent."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class ResidualBlock(nn.Module):
    """norm, SiLU, conv, norm scaled and shifted by the time embedding, SiLU, conv, plus the input.

    x (B, c_in, h, w), emb (B, E) -> (B, c_out, h', w'); h' = h, 2h (resample="up"), h/2 ("down").
    """

    def __init__(self, c_in, c_out, emb_width, dropout, resample=None):
        super().__init__()
        self.norm1, self.conv1 = group_norm(c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.emb = nn.Linear(emb_width, 2 * c_out)
        self.norm2, self.conv2 = group_norm(c_out), zero(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.skip = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)
        self.dropout, self.resample = nn.Dropout(dropout), resample

    def resize(self, x):
        if self.resample == "up":
            return F.interpolate(x, scale_factor=2)  # (B, c, h, w) -> (B, c, 2h, 2w), nearest
        return F.avg_pool2d(x, 2) if self.resample == "down" else x  # (B, c, h/2, w/2)

    def forward(self, x, emb, tokens=None):  # ignores the tokens: all blocks share one signature
        h = self.conv1(self.resize(F.silu(self.norm1(x))))  # (B, c_in, h, w) -> (B, c_out, h', w')
        scale, shift = self.emb(F.silu(emb))[:, :, None, None].chunk(2, 1)  # 2x (B, c_out, 1, 1)
        h = self.norm2(h) * (1 + scale) + shift
        return self.skip(self.resize(x)) + self.conv2(self.dropout(F.silu(h)))


class Attention(nn.Module):
    """Every position asks the context what belongs there: (x, context) -> (B, P, c).

    x (B, P, c): queries, one for each position of the latent image; context (B, M, k): keys and
    values, the N concept tokens (cross-attention) or x itself (self-attention).
    """

    def __init__(self, channels, context_width, heads):
        super().__init__()
        self.heads, self.record = heads, None  # record: a list inside of `record_attention`
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context_width, channels, bias=False)
        self.to_v = nn.Linear(context_width, channels, bias=False)
        self.to_out = nn.Linear(channels, channels)

    def forward(self, x, context):
        B, P, c = x.shape
        e = c // self.heads
        heads = lambda y: y.view(B, -1, self.heads, e).transpose(1, 2)  # (B, P, c) -> (B, H, P, e)
        q, k, v = heads(self.to_q(x)), heads(self.to_k(context)), heads(self.to_v(context))
        # The weights of a position, one for each token, sum to 1, so the concepts compete for it.
        # Tokens carry no position, so their order cannot matter.
        weights = (q * e**-0.5 @ k.mT).softmax(-1)  # (B, H, P, M)
        if self.record is not None:
            self.record.append(weights.detach().float().mean(1))  # (B, H, P, M) -> (B, P, M)
        out = weights @ v  # (B, H, P, e)
        return self.to_out(out.transpose(1, 2).reshape(B, P, c))


class GEGLU(nn.Module):
    """Feed-forward layer with a gate (Shazeer 2020): (B, P, c) -> (B, P, c), 4c hidden units."""

    def __init__(self, channels):
        super().__init__()
        self.to_value, self.to_gate = (nn.Linear(channels, 4 * channels) for _ in range(2))
        self.to_out = nn.Linear(4 * channels, channels)

    def forward(self, x):
        return self.to_out(self.to_value(x) * F.gelu(self.to_gate(x)))


class SpatialTransformer(nn.Module):
    """Attention among positions, attention to the tokens, feed-forward; all residual.

    x (B, c, h, w), tokens (B, N, d) -> (B, c, h, w). token_width None: no cross-attention (AdaGN).
    positions P: no attention among positions, but a learned vector for each that says where it is.
    """

    def __init__(self, channels, heads, token_width, positions=None):
        super().__init__()
        self.norm = group_norm(channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels)
        self.self_attention = self.cross_attention = self.positions = None
        if positions:
            self.positions = nn.Parameter(0.3 * torch.randn(positions, channels))  # (P, c)
        else:
            self.norm1 = nn.LayerNorm(channels)
            self.self_attention = SelfAttention(channels, channels, heads)
        if token_width is not None:
            self.norm2 = nn.LayerNorm(channels)
            self.cross_attention = Attention(channels, token_width, heads)
        self.norm3, self.feed_forward = nn.LayerNorm(channels), GEGLU(channels)
        self.proj_out = zero(nn.Linear(channels, channels))

    def forward(self, x, emb, tokens):
        B, c, h, w = x.shape
        y = self.proj_in(self.norm(x).flatten(2).transpose(1, 2))  # (B, c, h, w) -> (B, P, c)
        if self.positions is not None:
            y = y + self.positions  # (P, c), the same for all images
        else:
            y = y + self.self_attention(self.norm1(y))
        if self.cross_attention is not None:
            y = y + self.cross_attention(self.norm2(y), tokens)
        y = y + self.feed_forward(self.norm3(y))
        return x + self.proj_out(y).transpose(1, 2).reshape(B, c, h, w)  # (B, P, c) -> (B, c, h, w)


class Stage(nn.ModuleList):
    """Blocks applied one after the other, each to (x, emb, tokens)."""

    def forward(self, x, emb, tokens):
        for block in self:
            x = block(x, emb, tokens)
        return x


class UNet(nn.Module):
    """eps_theta(z_t, t, S) of eq. (3): predicts the noise in z_t from z_t, t and the tokens S.

    latent_channels  channels of z_t
    channels         width at full latent resolution; level i has channels * multipliers[i]
    blocks           residual blocks a level
    attention        downsampling factors at which a SpatialTransformer with `heads` heads follows
                     each residual block (the middle always has one)
    token_dim        width d of a concept token; num_tokens: N, which only AdaGN depends on
    conditioning     "cross": cross-attention to the tokens; "adagn": see AdaGNBlock
    skip_dropout     share of the channels of each skip connection that is set to 0 in training
    side             None, or the side of z_t: learned positions in place of self-attention
    """

    def __init__(self, latent_channels=3, channels=64, multipliers=(1, 2, 4, 4), blocks=2,
                 attention=(1, 2, 4), heads=8, token_dim=32, dropout=0.1,
                 conditioning="cross", num_tokens=20, skip_dropout=0.0, side=None):
        super().__init__()
        self.channels, self.blocks, self.multipliers = channels, blocks, multipliers
        self.attention, self.heads, self.token_dim = attention, heads, token_dim
        self.dropout, self.skip_dropout, self.side = dropout, skip_dropout, side
        self.conditioning, self.num_tokens = conditioning, num_tokens
        E = self.emb_width = 4 * channels
        self.time = nn.Sequential(nn.Linear(channels, E), nn.SiLU(), nn.Linear(E, E))

        # Down: what each stage puts out is kept for the skip connection to the way up.
        c = channels
        self.conv_in = nn.Conv2d(latent_channels, c, 3, padding=1)
        self.down, skips = nn.ModuleList(), [c]
        for level, multiplier in enumerate(multipliers):
            for _ in range(blocks):
                self.down.append(self.stage(c, channels * multiplier, level))
                c = channels * multiplier
                skips.append(c)
            if level < len(multipliers) - 1:
                self.down.append(Stage([self.residual(c, c, "down")]))
                skips.append(c)
        middle = self.transformer(c, len(multipliers) - 1)
        self.middle = Stage([self.residual(c, c), middle, self.residual(c, c)])
        self.up = self.way_up(c, skips)
        self.norm_out = group_norm(channels * multipliers[0])
        self.conv_out = zero(nn.Conv2d(channels * multipliers[0], latent_channels, 3, padding=1))

    def residual(self, c_in, c_out, resample=None):
        if self.conditioning == "adagn":
            condition_width = self.num_tokens * self.token_dim
            return AdaGNBlock(c_in, c_out, self.emb_width, self.dropout, condition_width, resample)
        return ResidualBlock(c_in, c_out, self.emb_width, self.dropout, resample)

    def transformer(self, c, level):
        token_width = self.token_dim if self.conditioning == "cross" else None
        positions = (self.side // 2**level) ** 2 if self.side else None
        return SpatialTransformer(c, self.heads, token_width, positions)

    def stage(self, c_in, c_out, level):
        attend = [self.transformer(c_out, level)] if 2**level in self.attention else []
        return Stage([self.residual(c_in, c_out), *attend])

    def way_up(self, c, skips):
        """The stages from c channels at the bottom up; skips: channels appended to each."""
        up = nn.ModuleList()
        for level in reversed(range(len(self.multipliers))):
            for i in range(self.blocks + 1):
                c_out = self.channels * self.multipliers[level]
                up.append(self.stage(c + skips.pop(), c_out, level))
                c = c_out
                if level > 0 and i == self.blocks:
                    up[-1].append(self.residual(c, c, "up"))
        return up

    def forward(self, z_t, t, tokens):  # no default for tokens: none must not pass unnoticed
        """z_t (B, C, h, w) float, t (B,) in 1..T, tokens (B, N, d) -> its noise (B, C, h, w)."""
        emb = self.time(timestep_embedding(t, self.channels))  # (B,) -> (B, E)
        x = self.conv_in(z_t)
        skips = [x]
        for block in self.down:
            x = block(x, emb, tokens)
            skips.append(x)
        x = self.middle(x, emb, tokens)
        for block in self.up:
            # What a skip connection does not bring has to come from the tokens (Jun et al. 2024).
            skip = F.dropout2d(skips.pop(), self.skip_dropout, self.training)
            x = block(torch.cat([x, skip], dim=1), emb, tokens)  # c + c_skip channels
        return self.conv_out(F.silu(self.norm_out(x)))


@contextlib.contextmanager
def record_attention(model):
    """`with record_attention(unet) as maps:` collects the cross-attention of every call inside.

    maps has one entry a layer, in the order in which they run: a list of tensors (B, P, N), one a
    call, averaged over the heads, float32, rows summing to 1.
    """
    layers = [m.cross_attention for m in model.modules()
              if isinstance(m, SpatialTransformer) and m.cross_attention is not None]
    for layer in layers:
        layer.record = []
    try:
        yield [layer.record for layer in layers]
    finally:
        for layer in layers:
            layer.record = None


# ---- A faster form, and ablations (Table 3, Table 13). Skip on first reading. -------------------


class SelfAttention(Attention):
    """Attention among the positions: x (B, P, c) -> (B, P, c), on a CPU in slices of the batch that
    leave its weights in the cache: the paper's P = 256 and batch of 64 make 67 MB in bfloat16."""

    def forward(self, x):
        weights = self.heads * x.shape[1] ** 2  # of one image
        n = max(1, 2**22 // weights) if x.device.type == "cpu" else len(x)
        return torch.cat([super(SelfAttention, self).forward(some, some) for some in x.split(n)])


class AdaGNBlock(ResidualBlock):
    """EncDiff w/ AdaGN, after Diff-AE (Preechakul et al. 2022): the concatenated tokens scale and
    shift both norms, at all positions alike. Tokens (B, N, d), condition_width N*d."""

    def __init__(self, c_in, c_out, emb_width, dropout, condition_width, resample=None):
        super().__init__(c_in, c_out, emb_width, dropout, resample)
        # N scalars need no wider layer than this, which keeps the U-Net near its usual size.
        self.narrow = nn.Linear(condition_width, emb_width // 4)
        self.condition1 = nn.Linear(emb_width // 4, 2 * c_in)
        self.condition2 = nn.Linear(emb_width // 4, 2 * c_out)

    def forward(self, x, emb, tokens):
        condition = F.silu(self.narrow(tokens.flatten(1)))  # (B, N, d) -> (B, N*d) -> (B, E/4)
        # (B, E/4) -> (B, 2c, 1, 1) -> 2x (B, c, 1, 1), to be broadcast over the positions
        scale1, shift1 = self.condition1(condition)[:, :, None, None].chunk(2, dim=1)
        scale2, shift2 = self.condition2(condition)[:, :, None, None].chunk(2, dim=1)
        h = F.silu(self.norm1(x) * (1 + scale1) + shift1)
        h = self.conv1(self.resize(h))  # (B, c_in, h, w) -> (B, c_out, h', w')
        scale, shift = self.emb(F.silu(emb))[:, :, None, None].chunk(2, dim=1)  # (B, c_out, 1, 1)
        h = (self.norm2(h) * (1 + scale) + shift) * (1 + scale2) + shift2
        return self.skip(self.resize(x)) + self.conv2(self.dropout(F.silu(h)))


class DirectDecoder(UNet):
    """EncDec w/o Diff: the U-Net's way up alone; tokens (B, N, d) -> clean latent (B, C, h, h).
    It starts from a learned tensor, without noise, skip connections or timestep (a learned vector
    stands for the embedding of that). latent_side: h; the other arguments are UNet's."""

    def __init__(self, latent_side, **options):
        super().__init__(**options)
        del self.conv_in, self.down, self.time
        c, low = self.channels * self.multipliers[-1], latent_side >> len(self.multipliers) - 1
        self.start = nn.Parameter(torch.randn(1, c, low, low))
        self.emb = nn.Parameter(torch.randn(1, self.emb_width))
        self.up = self.way_up(c, [0] * len(self.up))

    def forward(self, tokens):
        emb = self.emb.expand(len(tokens), -1)  # (1, E) -> (B, E)
        x = self.middle(self.start.expand(len(tokens), -1, -1, -1), emb, tokens)
        for block in self.up:
            x = block(x, emb, tokens)
        return self.conv_out(F.silu(self.norm_out(x)))


if __name__ == "__main__":
    torch.manual_seed(0)
    unet = UNet(token_dim=16).eval()
    count = sum(p.numel() for p in unet.parameters())
    print(f"paper's size, token width 16: {count:,} parameters (expected 37,469,635)")
    with record_attention(unet) as maps, torch.no_grad():
        noise = unet(torch.randn(2, 3, 16, 16), torch.tensor([1, 1000]), torch.randn(2, 20, 16))
    print(f"noise {tuple(noise.shape)}, largest {noise.abs().max():.0f} (expected 0, untrained)")
    first, rows = maps[0][0], maps[0][0].sum(-1)
    print(f"{len(maps)} cross-attention layers (expected 16); first map {tuple(first.shape)}; "
          f"its rows sum to {rows.min():.3f} .. {rows.max():.3f} (expected 1)")
