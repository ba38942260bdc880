"""The denoiser: a U-Net that predicts the noise in a latent, cross-attending to concept tokens.

WHERE     Read after encdiff.py, before train.py. Imports torch only, so it can be copied alone.
PAPER     arXiv 2402.09712, Sec. 3.1 ("Diffusion Model with Cross Attention"), Appendix D (Table 7);
          blocks: latent diffusion (Rombach et al. 2022) and ADM (Dhariwal & Nichol 2021).
SHAPES    B batch, N concept tokens, d width of a token, c channels, h x w latent grid, P = h*w
          positions, H heads, e = c/H channels of a head, E width of the timestep embedding.
IDEA      A query is a position of the latent image; keys and values are the N concept tokens.
          At each position the softmax over the tokens makes the concepts compete. The idea is that
          the loss is lower if a token tells what is drawn in one region and gets little attention
          elsewhere. `python sample.py attention` shows for which tokens it holds.
          The denoiser also sees z_t, but there the image is covered by noise. The tokens are its
          only view of the image without noise.
          The last layer of each block starts at zero, so a block adds nothing at first. The last
          layer of all, `conv_out`, starts at zero too, so the untrained network predicts 0, the
          mean of the noise. So in step 1 of training only `conv_out` gets a gradient. In step 2 the
          last layer of each block does, too, and `conv_in`, `norm_out` and the 1x1 convolutions
          `skip` of the residual blocks. The tokens get one from step 3 on.
DIFFERS   The layers are the paper's: 37,549,507 parameters with the defaults, 37,469,635 with token
          width 16, as in the authors' code. Attention is written out, as torch's fused one has a
          slow backward pass on CPUs.
TRY       python unet.py   ->   parameters, shapes, and an attention map whose rows sum to 1
"""
import contextlib
import math

import torch
import torch.nn as nn
import torch.nn.functional as F


def timestep_embedding(t, width):
    """Sinusoids of t, as in "Attention Is All You Need": t (B,) -> (B, width) float32."""
    # Wavelengths go from 2 pi to (at width 64) 2 pi * 7,499: the short ones tell near timesteps
    # apart, the long ones far timesteps.
    half = math.ceil(width / 2)
    steps = torch.arange(half, dtype=torch.float32, device=t.device)
    exponents = -math.log(10_000) * steps / half
    frequencies = exponents.exp()  # 1, falling to 1 / 7,499 at width 64
    angles = t[:, None].float() * frequencies  # (B, 1) * (half,) -> (B, half)

    sinusoids = torch.cat([angles.cos(), angles.sin()], dim=1)  # 2x (B, half) -> (B, 2 half)
    return sinusoids[:, :width]  # an odd width has one sine less


def group_norm(channels, eps=1e-5):
    """GroupNorm with at most 32 groups of at least two channels each: 8 groups for 48 channels."""
    # With one channel per group, a channel's mean and scale would be lost.
    groups = math.gcd(32, channels // 2, channels)
    return nn.GroupNorm(groups, channels, eps=eps)


def zero(layer):
    """The layer with its parameters set to zero: the residual branch that it ends starts as 0."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def scale_and_shift(x, vector):
    """x (B, c, h, w), scaled and shifted in the same way at all positions by vector (B, 2c)."""
    scale, shift = vector[:, :, None, None].chunk(2, dim=1)  # (B, 2c, 1, 1) -> 2x (B, c, 1, 1)
    return x * (1 + scale) + shift


class ResidualBlock(nn.Module):
    """norm, SiLU, conv, norm scaled and shifted by the timestep, SiLU, conv, plus the input.

    x (B, c_in, h, w), emb (B, E) -> (B, c_out, h', w')
    resample: None keeps h' = h, "up" gives h' = 2h, "down" gives h' = h/2; w' likewise.
    """

    def __init__(self, c_in, c_out, emb_width, dropout, resample=None):
        super().__init__()
        self.resample = resample
        self.norm1 = group_norm(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.emb = nn.Linear(emb_width, 2 * c_out)  # -> a scale and a shift for each channel
        self.norm2 = group_norm(c_out)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.skip = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def resize(self, x):
        if self.resample == "up":
            return F.interpolate(x, scale_factor=2)  # (B, c, h, w) -> (B, c, 2h, 2w), nearest
        if self.resample == "down":
            return F.avg_pool2d(x, 2)  # (B, c, h, w) -> (B, c, h/2, w/2)
        return x

    def forward(self, x, emb, tokens):
        """The tokens are not used: all blocks are called with the same three arguments."""
        y = F.silu(self.norm1(x))
        y = self.conv1(self.resize(y))  # (B, c_in, h, w) -> (B, c_out, h', w')
        y = scale_and_shift(self.norm2(y), self.emb(F.silu(emb)))
        y = self.conv2(self.dropout(F.silu(y)))
        return self.skip(self.resize(x)) + y


class Attention(nn.Module):
    """Each position asks the context what belongs there: (x, context) -> (B, P, c).

    x        (B, P, c): gives the queries, one for each position of the latent image
    context  (B, M, context_width): gives keys and values. It is the N concept tokens
             (cross-attention) or x itself (self-attention).
    heads    has to divide the channels c, else ValueError
    """

    def __init__(self, channels, context_width, heads):
        super().__init__()
        if heads < 1 or channels % heads != 0:
            raise ValueError(f"{channels} channels cannot be split among {heads} heads; "
                             "expected a number of heads that divides the channels")
        self.heads = heads
        self.record = None  # a list inside of `record_attention`
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context_width, channels, bias=False)
        self.to_v = nn.Linear(context_width, channels, bias=False)
        self.to_out = nn.Linear(channels, channels)

    def split_heads(self, y):
        return y.unflatten(2, (self.heads, -1)).transpose(1, 2)  # (B, P, c) -> (B, H, P, e)

    def forward(self, x, context):
        q = self.split_heads(self.to_q(x))  # (B, H, P, e)
        k = self.split_heads(self.to_k(context))  # (B, H, M, e)
        v = self.split_heads(self.to_v(context))  # (B, H, M, e)

        # The weights of a position sum to 1. In cross-attention there is one for each token, so the
        # concepts compete for the position. The order of the tokens does not matter.
        scale = q.shape[3] ** -0.5
        logits = (q * scale) @ k.mT  # (B, H, P, e) @ (B, H, e, M) -> (B, H, P, M)
        weights = logits.softmax(dim=-1)
        if self.record is not None:
            self.record.append(weights.detach().float().mean(1))  # (B, H, P, M) -> (B, P, M)

        out = weights @ v  # (B, H, P, M) @ (B, H, M, e) -> (B, H, P, e)
        return self.to_out(out.transpose(1, 2).flatten(2))  # (B, H, P, e) -> (B, P, c)


class GEGLU(nn.Module):
    """Feed-forward layer with a gate (Shazeer 2020): (B, P, c) -> (B, P, c), 4c hidden units."""

    def __init__(self, channels):
        super().__init__()
        self.to_value = nn.Linear(channels, 4 * channels)
        self.to_gate = nn.Linear(channels, 4 * channels)
        self.to_out = nn.Linear(4 * channels, channels)

    def forward(self, x):
        gate = F.gelu(self.to_gate(x))
        return self.to_out(self.to_value(x) * gate)


class SpatialTransformer(nn.Module):
    """Attention among positions, attention to the tokens, feed-forward; each adds to its input.

    x (B, c, h, w), tokens (B, N, token_dim) -> (B, c, h, w)
    """

    def __init__(self, channels, heads, token_dim):
        super().__init__()
        self.norm = group_norm(channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels)
        self.norm1 = nn.LayerNorm(channels)
        self.self_attention = Attention(channels, channels, heads)
        self.norm2 = nn.LayerNorm(channels)
        self.cross_attention = Attention(channels, token_dim, heads)
        self.norm3 = nn.LayerNorm(channels)
        self.feed_forward = GEGLU(channels)
        self.proj_out = zero(nn.Linear(channels, channels))

    def forward(self, x, emb, tokens):
        """emb (B, E) is not used: all blocks are called with the same three arguments."""
        y = self.norm(x).flatten(2).transpose(1, 2)  # (B, c, h, w) -> (B, c, P) -> (B, P, c)
        y = self.proj_in(y)

        z = self.norm1(y)
        y = y + self.self_attention(z, z)
        y = y + self.cross_attention(self.norm2(y), tokens)
        y = y + self.feed_forward(self.norm3(y))

        y = self.proj_out(y)
        return x + y.transpose(1, 2).reshape(x.shape)  # (B, P, c) -> (B, c, h, w)


class Stack(nn.ModuleList):
    """A residual block and what follows it; each is called with (x, emb, tokens)."""

    def forward(self, x, emb, tokens):
        for block in self:
            x = block(x, emb, tokens)
        return x


class UNet(nn.Module):
    """eps_theta(z_t, t, S) of eq. (3): predicts the noise in z_t from z_t, t and the tokens S.

    latent_channels  channels C of z_t
    channels         width at full resolution
    multipliers      at depth i, where the resolution has been halved i times, the width is
                     channels * multipliers[i]
    blocks           residual blocks at each depth on the way down; one more on the way up. Another
                     one halves or doubles the resolution between two depths.
    attention_at     downsampling factors 2^i at which a SpatialTransformer follows each of the
                     `blocks`; the middle has one in any case
    heads            attention heads; divides every width
    token_dim        width d of a concept token
    dropout          share of the features that a residual block drops in training
    """

    def __init__(self, latent_channels=3, channels=64, multipliers=(1, 2, 4, 4), blocks=2,
                 attention_at=(1, 2, 4), heads=8, token_dim=32, dropout=0.1):
        super().__init__()
        if not multipliers or blocks < 1 or channels < 1:
            raise ValueError(f"multipliers {multipliers}, {blocks} blocks and {channels} channels; "
                             "expected one or more of each")
        self.latent_channels = latent_channels
        self.channels = channels
        self.widths = [channels * multiplier for multiplier in multipliers]
        self.blocks = blocks
        self.attention_at = attention_at
        self.heads = heads
        self.token_dim = token_dim
        self.dropout = dropout
        self.emb_width = 4 * channels
        self.build()

    def build(self):
        """Make all layers, in the order in which `forward` calls them. (A method of its own, so
        that a subclass can make others.)"""
        E = self.emb_width
        self.time = nn.Sequential(nn.Linear(self.channels, E), nn.SiLU(), nn.Linear(E, E))
        self.conv_in = nn.Conv2d(self.latent_channels, self.channels, 3, padding=1)
        self.down, skip_channels = self.make_down()
        self.middle = self.make_middle()
        self.up = self.make_up(skip_channels)
        self.norm_out = group_norm(self.widths[0])
        self.conv_out = zero(nn.Conv2d(self.widths[0], self.latent_channels, 3, padding=1))

    # The way down keeps each of its outputs, and each stack of the way up takes one of them, the
    # latest first. With the default arguments the outputs have these channels. A bar separates the
    # resolutions; "halved" marks a stack that halves them, "doubled" one that doubles them.
    #   conv_in 64, 64, 64 | halved 64, 128, 128 | halved 128, 256, 256 | halved 256, 256, 256
    # So the stacks of the way up take these channels, each from the stack before and from its skip:
    #   256 + 256, 256 + 256, 256 + 256, doubled | 256 + 256, 256 + 256, 256 + 128, doubled
    #   | 256 + 128, 128 + 128, 128 + 64, doubled | 128 + 64, 64 + 64, 64 + 64

    def make_down(self):
        """-> the stacks of the way down, and the channels of all skip connections."""
        down = nn.ModuleList()
        c = self.channels
        skip_channels = [c]  # what conv_in puts out
        for depth, width in enumerate(self.widths):
            if depth > 0:
                down.append(Stack([self.residual_block(c, c, "down")]))
                skip_channels.append(c)
            for _ in range(self.blocks):
                down.append(self.make_stack(c, width, depth))
                c = width
                skip_channels.append(c)
        return down, skip_channels

    def make_middle(self):
        c = self.widths[-1]
        transformer = self.transformer(c)
        return Stack([self.residual_block(c, c), transformer, self.residual_block(c, c)])

    def make_up(self, skip_channels):
        """-> the stacks of the way up; skip_channels: of make_down, taken from the end."""
        up = nn.ModuleList()
        skip_channels = list(skip_channels)
        c = self.widths[-1]
        for depth, width in reversed(list(enumerate(self.widths))):
            for _ in range(self.blocks + 1):
                up.append(self.make_stack(c + skip_channels.pop(), width, depth))
                c = width
            if depth > 0:
                up[-1].append(self.residual_block(c, c, "up"))
        return up

    def make_stack(self, c_in, c_out, depth):
        if 2**depth not in self.attention_at:
            return Stack([self.residual_block(c_in, c_out)])

        transformer = self.transformer(c_out)
        return Stack([self.residual_block(c_in, c_out), transformer])

    def residual_block(self, c_in, c_out, resample=None):
        return ResidualBlock(c_in, c_out, self.emb_width, self.dropout, resample)

    def transformer(self, c):
        return SpatialTransformer(c, self.heads, self.token_dim)

    def adamw_layers(self):
        """Where the network begins and ends: train.py's optimizer Muon leaves these to AdamW."""
        return [self.conv_in, self.conv_out]

    def forward(self, z_t, t, tokens):
        """The noise in z_t: (B, C, h, w). ValueError if a shape does not fit.

        z_t     (B, C, h, w) float; h and w are multiples of 2^(len(multipliers) - 1)
        t       (B,) timesteps in 1..T, or a single one for all images
        tokens  (B, N, d) concept tokens of the images, float
        """
        if not torch.is_tensor(t):
            t = torch.tensor(t, device=z_t.device)
        check_inputs(self, z_t, t, tokens)
        t = t.expand(z_t.shape[0])  # a single timestep -> (B,)

        emb = timestep_embedding(t, self.channels).to(z_t.dtype)  # (B,) -> (B, channels)
        emb = self.time(emb)  # (B, channels) -> (B, E)

        x = self.conv_in(z_t)  # (B, C, h, w) -> (B, channels, h, w)
        skips = [x]
        for stack in self.down:
            x = stack(x, emb, tokens)
            skips.append(x)

        x = self.middle(x, emb, tokens)

        for stack in self.up:
            # (B, c, ...), (B, c_skip, ...) -> (B, c + c_skip, ...)
            x = torch.cat([x, skips.pop()], dim=1)
            x = stack(x, emb, tokens)

        return self.conv_out(F.silu(self.norm_out(x)))  # (B, channels, h, w) -> (B, C, h, w)


# ---- Maps of attention, checks, other denoisers (Table 3). Skip on first reading. ----------------


@contextlib.contextmanager
def record_attention(model):
    """`with record_attention(unet) as maps:` collects the cross-attention of every call inside.

    maps has one entry for each cross-attention layer, in the order in which they run: a list of
    tensors (B, P, N), one for each call, averaged over the heads, float32, with rows that sum to 1.
    """
    layers = [module.cross_attention for module in model.modules()
              if isinstance(module, SpatialTransformer)]
    outer = [layer.record for layer in layers]  # lists if this `with` stands inside another one
    maps = [[] for _ in layers]

    for layer, record in zip(layers, maps):
        layer.record = record
    try:
        yield maps
    finally:
        for layer, record, outer_record in zip(layers, maps, outer):
            layer.record = outer_record
            if outer_record is not None:
                outer_record.extend(record)


def check_shape(name, tensor, *expected):
    """ValueError unless the tensor has this shape; a letter stands for any size."""
    shape = tuple(getattr(tensor, "shape", ()))
    fits = len(shape) == len(expected) and all(
        isinstance(size, str) or n == size for n, size in zip(shape, expected))

    if not fits:
        sizes = str(expected).replace("'", "")
        raise ValueError(f"{name} has shape {shape}; expected {sizes}")


def check_inputs(unet, z_t, t, tokens):
    """ValueError for shapes that UNet's `forward` cannot take."""
    check_shape("z_t", z_t, "B", unet.latent_channels, "h", "w")
    B, C, h, w = z_t.shape
    unit = 2 ** (len(unet.widths) - 1)
    if h % unit != 0 or w % unit != 0:
        raise ValueError(f"z_t has a grid of {h} x {w}; expected multiples of {unit}, as the "
                         "way down halves the sides")

    if t.shape not in [(), (1,)]:  # a single timestep serves all images
        check_shape("t", t, B)
    check_shape("tokens", tokens, B, "N", unet.token_dim)


class AdaGNBlock(ResidualBlock):
    """A residual block in which the concatenated tokens scale and shift both norms, in the same
    way at all positions, after Diff-AE (Preechakul et al. 2022). tokens (B, N, d)."""

    def __init__(self, c_in, c_out, emb_width, dropout, condition_width, resample=None):
        super().__init__(c_in, c_out, emb_width, dropout, resample)
        # N scalars need no wider layer than this, which keeps the U-Net near its usual size.
        self.narrow = nn.Linear(condition_width, emb_width // 4)
        self.condition1 = nn.Linear(emb_width // 4, 2 * c_in)
        self.condition2 = nn.Linear(emb_width // 4, 2 * c_out)

    def forward(self, x, emb, tokens):
        condition = F.silu(self.narrow(tokens.flatten(1)))  # (B, N, d) -> (B, N*d) -> (B, E/4)

        y = scale_and_shift(self.norm1(x), self.condition1(condition))
        y = self.conv1(self.resize(F.silu(y)))  # (B, c_in, h, w) -> (B, c_out, h', w')
        y = scale_and_shift(self.norm2(y), self.emb(F.silu(emb)))
        y = scale_and_shift(y, self.condition2(condition))
        y = self.conv2(self.dropout(F.silu(y)))
        return self.skip(self.resize(x)) + y


class PositionTransformer(nn.Module):
    """A SpatialTransformer without attention to the tokens: (B, c, h, w) -> (B, c, h, w)."""

    def __init__(self, channels, heads):
        super().__init__()
        self.norm = group_norm(channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels)
        self.norm1 = nn.LayerNorm(channels)
        self.self_attention = Attention(channels, channels, heads)
        self.norm3 = nn.LayerNorm(channels)
        self.feed_forward = GEGLU(channels)
        self.proj_out = zero(nn.Linear(channels, channels))

    def forward(self, x, emb, tokens):
        y = self.norm(x).flatten(2).transpose(1, 2)  # (B, c, h, w) -> (B, c, P) -> (B, P, c)
        y = self.proj_in(y)

        z = self.norm1(y)
        y = y + self.self_attention(z, z)
        y = y + self.feed_forward(self.norm3(y))

        y = self.proj_out(y)
        return x + y.transpose(1, 2).reshape(x.shape)  # (B, P, c) -> (B, c, h, w)


class AdaGNUNet(UNet):
    """EncDiff w/ AdaGN (Table 3): the tokens scale and shift the norms; nothing attends to them.

    num_tokens: N, on which the widths of its layers depend; the other arguments are UNet's.
    """

    def __init__(self, num_tokens, **options):
        self.num_tokens = num_tokens  # set first, as UNet's __init__ makes the blocks
        super().__init__(**options)

    def residual_block(self, c_in, c_out, resample=None):
        condition_width = self.num_tokens * self.token_dim
        return AdaGNBlock(c_in, c_out, self.emb_width, self.dropout, condition_width, resample)

    def transformer(self, c):
        return PositionTransformer(c, self.heads)

    def forward(self, z_t, t, tokens):
        check_shape("tokens", tokens, "B", self.num_tokens, self.token_dim)
        return super().forward(z_t, t, tokens)


class DirectDecoder(UNet):
    """EncDec w/o Diff (Table 3): tokens (B, N, d) -> z_0 (B, C, h, h).

    It is the middle and the way up of a U-Net. It starts from a learned tensor, without noise and
    skip connections; a learned vector stands for the embedding of the timestep.
    latent_side: h, else ValueError a multiple of 2^(levels - 1); the other arguments are UNet's.
    """

    def __init__(self, latent_side, **options):
        self.latent_side = latent_side  # set first, as UNet's __init__ calls `build`
        super().__init__(**options)

    def build(self):
        unit = 2 ** (len(self.widths) - 1)
        if self.latent_side % unit != 0:
            raise ValueError(f"latent_side is {self.latent_side}; expected a multiple of {unit}")

        low = self.latent_side // unit
        self.start = nn.Parameter(torch.randn(1, self.widths[-1], low, low))
        self.emb = nn.Parameter(torch.randn(1, self.emb_width))
        self.middle = self.make_middle()
        self.up = self.make_up([0] * len(self.widths) * (self.blocks + 1))
        self.norm_out = group_norm(self.widths[0])
        self.conv_out = zero(nn.Conv2d(self.widths[0], self.latent_channels, 3, padding=1))

    def adamw_layers(self):
        return [self.conv_out]

    def forward(self, tokens):
        check_shape("tokens", tokens, "B", "N", self.token_dim)
        B = tokens.shape[0]

        emb = self.emb.expand(B, -1)  # (1, E) -> (B, E)
        x = self.start.expand(B, -1, -1, -1)  # (1, c, low, low) -> (B, c, low, low)
        x = self.middle(x, emb, tokens)
        for stack in self.up:
            x = stack(x, emb, tokens)
        return self.conv_out(F.silu(self.norm_out(x)))


if __name__ == "__main__":
    torch.manual_seed(0)
    unet = UNet(token_dim=16).eval()
    count = sum(p.numel() for p in unet.parameters())
    print(f"paper's size, token width 16: {count:,} parameters (expected 37,469,635)")

    z_t = torch.randn(2, 3, 16, 16)
    t = torch.tensor([1, 1000])
    tokens = torch.randn(2, 20, 16)
    with record_attention(unet) as maps, torch.no_grad():
        noise = unet(z_t, t, tokens)
    print(f"noise {tuple(noise.shape)}, largest {noise.abs().max():.0f} (expected 0, untrained)")

    print(f"{len(maps)} cross-attention layers (expected 16)")
    weights = maps[0][0]  # of the first layer, in the first call: (2, 256, 20)
    sums = weights.sum(dim=-1)
    print(f"map of the first layer {tuple(weights.shape)}; its rows sum to "
          f"{sums.min():.3f} .. {sums.max():.3f} (expected 1)")
