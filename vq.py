"""The first stage: a vector-quantised autoencoder that gives diffusion a small latent to work in.

WHERE     Read after unet.py, before metrics.py. Imports torch only; copy it freely.
PAPER     arXiv 2402.09712, Sec. 4.1 ("VQ-reg") after latent diffusion (Rombach et al. 2022);
          VQ-VAE: van den Oord et al. 2017.
SHAPES    B batch, image (B, 3, S, S) in [-1, 1], latent (B, C, S/f, S/f) where f is the
          downsampling factor, K codebook entries.
IDEA      Each of the (S/f)^2 latent vectors is replaced by the nearest of K codebook vectors, and
          the decoder sees only those. Rounding has no gradient, so the decoder's gradient is copied
          to the encoder as if rounding were the identity ("straight-through"), while two extra
          terms pull codebook and encoder towards each other. An entry that is nearest to nothing
          gets no gradient and stays dead, so the codebook starts from latents of real images, once
          a time without rounding has made these differ. Diffusion works on the latent BEFORE
          rounding; `decode` rounds first, which cleans up what sampling gets slightly wrong. By
          then the first stage is frozen: the second may not make its own task easy.
DIFFERS   From the authors' code: L1 alone judges reconstructions, without LPIPS (its weights cannot
          be shipped) or a patch discriminator. Ours are `patch`, which saves the expensive layers
          at full resolution, and `linear`, an encoder that costs joint training next to nothing.
TRY       python vq.py   ->   shapes, and a gradient that passes through the rounding unchanged
"""
import functools

import torch
import torch.nn as nn
import torch.nn.functional as F


def group_norm(channels):
    """GroupNorm as in latent diffusion: 32 groups, so channels have to be a multiple of 32."""
    return nn.GroupNorm(32, channels, eps=1e-6)


class ResidualBlock(nn.Module):
    """x (B, c_in, h, w) -> (B, c_out, h, w)."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.body = nn.Sequential(
            group_norm(c_in), nn.SiLU(), nn.Conv2d(c_in, c_out, 3, padding=1),
            group_norm(c_out), nn.SiLU(), nn.Conv2d(c_out, c_out, 3, padding=1))
        self.skip = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def forward(self, x):
        return self.skip(x) + self.body(x)


class PositionAttention(nn.Module):
    """One-head attention among all positions, so that far ones agree: (B, c, h, w) -> same."""

    def __init__(self, channels):
        super().__init__()
        self.norm, self.qkv = group_norm(channels), nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        B, c, h, w = x.shape
        q, k, v = self.qkv(self.norm(x)).flatten(2).chunk(3, dim=1)  # (B, 3c, h, w) -> 3x (B, c, P)
        weights = (q.transpose(1, 2) @ k * c**-0.5).softmax(dim=-1)  # (B, P, P)
        return x + self.out((v @ weights.transpose(1, 2)).view(B, c, h, w))  # from (B, c, P)


class Quantizer(nn.Module):
    """Nearest-neighbour rounding to a learned codebook (van den Oord et al. 2017, eq. 1-3).

    forward: z (B, C, h, w) -> z_q of z's shape, loss (scalar), indices (B, h, w) int64. The first
    `warmup` training batches pass UNROUNDED, with loss 0 and indices 0; the next one initialises
    the codebook. Processes that train together call `initialise` themselves, with equal z and seed.
    """

    def __init__(self, size, channels, commitment=0.25, warmup=200):
        super().__init__()
        self.commitment, self.warmup = commitment, warmup
        self.codebook = nn.Parameter(torch.randn(size, channels))  # (K, C)
        self.register_buffer("ready", torch.tensor(False))  # False: z passes through
        self.register_buffer("batches", torch.tensor(0))  # passed through in training

    @torch.no_grad()
    def initialise(self, z):
        """Set the codebook to random latent vectors of z (B, C, h, w)."""
        vectors = z.float().permute(0, 2, 3, 1).flatten(0, 2)  # (B, C, h, w) -> (B*h*w, C)
        chosen = vectors[torch.randint(len(vectors), (len(self.codebook),), device=z.device)]
        # A little noise tells entries apart that come from equal patches, such as plain sky.
        self.codebook.copy_(chosen + 0.02 * vectors.std() * torch.randn_like(chosen))
        self.ready.fill_(True)

    @torch.no_grad()
    def nearest(self, vectors):
        """Vectors (M, C) -> (M,) int64, the indices of the nearest codebook entries."""
        # |z - e|^2 = |z|^2 - 2 z.e + |e|^2, and |z|^2 is the same for all entries.
        squares = self.codebook.pow(2).sum(1)  # (K,)
        return torch.addmm(squares, vectors, self.codebook.t(), alpha=-2).argmin(1)  # (M, K)

    def forward(self, z):
        if self.training and not self.ready:
            self.batches += 1
            if self.batches > self.warmup:
                self.initialise(z)
        if not self.ready:
            # The codebook stays in the graph (times 0): data-parallel training wants all gradients.
            return z, 0 * self.codebook.sum(), torch.zeros_like(z[:, 0], dtype=torch.long)
        B, C, h, w = z.shape
        with torch.autocast(z.device.type, enabled=False):  # in bfloat16 many distances would tie
            vectors = z.float().permute(0, 2, 3, 1).reshape(-1, C)  # (B, C, h, w) -> (B*h*w, C)
            indices = self.nearest(vectors)
            entries = F.embedding(indices, self.codebook)  # (B*h*w, C)
            # The codebook moves to the encoder's outputs; the encoder commits to its entries.
            loss = (F.mse_loss(entries, vectors.detach())
                    + self.commitment * F.mse_loss(vectors, entries.detach()))
            # Straight-through: the value of the entry, the gradient of the unrounded vector.
            rounded = vectors + (entries - vectors).detach()  # (B*h*w, C)
        z_q = rounded.view(B, h, w, C).permute(0, 3, 1, 2)  # -> (B, C, h, w)
        # Contiguous, as the decoder's GroupNorm is slow in the permuted layout.
        return z_q.contiguous(), loss, indices.view(B, h, w)  # (B*h*w,) -> (B, h, w)


class VQAutoencoder(nn.Module):
    """Image -> small latent -> nearest codebook vectors -> image.

    channels, multipliers   width at each level; each further level halves the resolution
    blocks                  residual blocks a level (one more in the decoder)
    latent_channels         C; codebook_size: K; commitment: weight of the commitment loss
    patch                   pixels folded into channels at the input; f = patch * 2^(levels - 1)
    linear                  the encoder is one 3 x 3 convolution over blocks of f x f pixels
    """

    def __init__(self, channels=32, multipliers=(1, 2, 4), blocks=2, latent_channels=3,
                 codebook_size=2048, commitment=0.25, patch=1, linear=False):
        super().__init__()
        self.factor, self.latent_channels = patch * 2 ** (len(multipliers) - 1), latent_channels
        widths = [channels * m for m in multipliers]
        c, top, pixels = widths[0], widths[-1], 3 * patch**2
        middle = lambda: [ResidualBlock(top, top), PositionAttention(top), ResidualBlock(top, top)]
        if linear:  # each latent number is a weighted sum of the pixels around its position
            down = [nn.PixelUnshuffle(self.factor),
                    nn.Conv2d(3 * self.factor**2, latent_channels, 3, padding=1)]
        else:
            down = [nn.PixelUnshuffle(patch), nn.Conv2d(pixels, c, 3, padding=1)]
            for level, width in enumerate(widths):
                if level > 0:
                    down.append(nn.Conv2d(c, c, 3, stride=2, padding=1))
                for _ in range(blocks):
                    down.append(ResidualBlock(c, width))
                    c = width
            down += [*middle(), group_norm(top), nn.SiLU(),
                     nn.Conv2d(top, latent_channels, 3, padding=1)]
        self.encoder = nn.Sequential(*down)
        self.quantizer = Quantizer(codebook_size, latent_channels, commitment)
        up, c = [nn.Conv2d(latent_channels, top, 3, padding=1), *middle()], top
        for level, width in reversed(list(enumerate(widths))):
            for _ in range(blocks + 1):
                up.append(ResidualBlock(c, width))
                c = width
            if level > 0:
                up += [nn.Upsample(scale_factor=2), nn.Conv2d(c, c, 3, padding=1)]
        self.decoder = nn.Sequential(*up, group_norm(c), nn.SiLU(),
                                     nn.Conv2d(c, pixels, 3, padding=1), nn.PixelShuffle(patch))

    def encode(self, x):
        """Images (B, 3, S, S) in [-1, 1] -> latent before quantisation (B, C, S/f, S/f)."""
        return self.encoder(x)

    def quantize(self, z):
        """-> z_q of z's shape, codebook loss (scalar), indices (B, S/f, S/f) int64."""
        return self.quantizer(z)

    def decode(self, z):
        """Latent (B, C, S/f, S/f), quantised here -> images (B, 3, S, S), about [-1, 1]."""
        return self.decoder(self.quantize(z)[0])

    def forward(self, x):
        """-> reconstruction of x's shape, codebook loss (scalar), indices (B, S/f, S/f)."""
        z_q, loss, indices = self.quantize(self.encode(x))
        return self.decoder(z_q), loss, indices


def codebook_usage(counts):
    """counts (K,), of many batches -> share of entries used, in [0, 1], and perplexity in [1, K]:
    how many entries, all used equally, would have the same entropy."""
    p = counts.double() / counts.sum().clamp(min=1)
    entropy = -(p * p.clamp(min=1e-12).log()).sum()
    return (counts > 0).double().mean().item(), entropy.exp().item()


class FirstStageLoss(nn.Module):
    """L1 + squared * L2 + codebook loss, with which the first stage is trained: images (B, 3, S, S)
    in [-1, 1] -> loss (scalar), reconstruction, indices."""

    def __init__(self, autoencoder, squared=0.0):
        super().__init__()
        self.autoencoder, self.squared = autoencoder, squared

    def forward(self, images):
        reconstruction, codebook_loss, indices = self.autoencoder(images)
        reconstruction = reconstruction.float()
        loss = F.l1_loss(reconstruction, images) + self.squared * F.mse_loss(reconstruction, images)
        return loss + codebook_loss, reconstruction, indices


# ---- What train.py --first-stage names ----------------------------------------------------------


class Pixels(nn.Module):
    """No first stage: an orthogonal map, (B, 3, S, S) -> (B, 3 f^2, S/f, S/f), and its inverse."""

    def __init__(self, factor=8):
        super().__init__()
        self.factor, self.latent_channels = factor, 3 * factor**2
        self.encode, self.decode = nn.PixelUnshuffle(factor), nn.PixelShuffle(factor)


# The paper's sizes; those of the preset `small`; no first stage.
KINDS = {"deep": VQAutoencoder,
         "linear": functools.partial(VQAutoencoder, channels=64, multipliers=(1, 2), blocks=1,
                                     latent_channels=4, codebook_size=8192, patch=4, linear=True),
         "pixels": Pixels}


if __name__ == "__main__":
    torch.manual_seed(0)
    model = VQAutoencoder()
    x = torch.rand(2, 3, 64, 64) * 2 - 1
    z = model.encode(x).detach().requires_grad_()
    model.quantizer.initialise(z)
    z_q = model.quantize(z)[0]
    print(f"image {tuple(x.shape)} -> latent {tuple(z.shape)} -> rounded {tuple(z_q.shape)}, "
          f"{sum(p.numel() for p in model.parameters()):,} parameters")
    z_q.sum().backward()
    print(f"gradient through rounding: {z.grad.unique().tolist()} (expected [1.0])")
