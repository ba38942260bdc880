"""The first stage: a vector-quantised autoencoder that gives diffusion a small latent to work in.

WHERE     Read after train.py, before metrics.py. Imports torch only, so it can be copied alone.
PAPER     arXiv 2402.09712, Sec. 4.1 ("VQ-reg") after latent diffusion (Rombach et al. 2022);
          VQ-VAE: van den Oord et al. 2017. Eq. (6) and Table 1: the VAEs at the end.
SHAPES    B batch, image (B, 3, S, S) in [-1, 1], latent (B, C, S/f, S/f) where f is the
          downsampling factor, K codebook entries.
IDEA      Each of the (S/f)^2 latent vectors is replaced by the nearest of K codebook vectors, and
          the decoder sees only those. Rounding has no gradient. So the decoder's gradient is copied
          to the encoder as if rounding were the identity ("straight-through"), and two extra terms
          of the loss pull codebook and encoder towards each other.
          A codebook entry that is nearest to no latent vector gets no gradient and is never used.
          So the codebook starts from latent vectors of real images, after a warm-up without
          rounding in which the encoder has learnt to tell images apart.
          Diffusion works on the latent before rounding. `decode` rounds first, which removes small
          errors of sampling. In joint training the first stage is frozen: otherwise it could make
          noise easy to predict by shrinking its latents.
DIFFERS   From the authors' code: reconstructions are judged by L1 (the preset `small` adds a
          squared error), without LPIPS, whose weights cannot be shipped, and without a patch
          discriminator. Two options are ours: `patch` leaves out the expensive layers at full
          resolution; `linear` makes the encoder one convolution, which costs joint training next to
          nothing.
TRY       python vq.py   ->   shapes, and a gradient that passes through the rounding unchanged
"""
import functools
import math

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F


def group_norm(channels):
    """GroupNorm as in latent diffusion: ValueError unless channels is a multiple of 32."""
    if channels % 32 != 0:
        raise ValueError(f"{channels} channels; expected a multiple of 32, the number of groups")
    return nn.GroupNorm(32, channels, eps=1e-6)


class ResidualBlock(nn.Module):
    """norm, SiLU, conv, twice, plus the input: x (B, c_in, h, w) -> (B, c_out, h, w)."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.body = nn.Sequential(
            group_norm(c_in),
            nn.SiLU(),
            nn.Conv2d(c_in, c_out, 3, padding=1),
            group_norm(c_out),
            nn.SiLU(),
            nn.Conv2d(c_out, c_out, 3, padding=1),
        )
        self.skip = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def forward(self, x):
        return self.skip(x) + self.body(x)


class PositionAttention(nn.Module):
    """Attention with one head among all positions, so that distant positions can agree:
    x (B, c, h, w) -> (B, c, h, w)."""

    def __init__(self, channels):
        super().__init__()
        self.norm = group_norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        B, c, h, w = x.shape
        qkv = self.qkv(self.norm(x)).flatten(2)  # (B, c, h, w) -> (B, 3c, h, w) -> (B, 3c, P)
        q, k, v = qkv.chunk(3, dim=1)  # 3x (B, c, P)

        scores = q.transpose(1, 2) @ k  # (B, P, c) @ (B, c, P) -> (B, P, P)
        weights = (scores * c**-0.5).softmax(dim=-1)
        mixed = v @ weights.transpose(1, 2)  # (B, c, P) @ (B, P, P) -> (B, c, P)
        return x + self.out(mixed.view(B, c, h, w))


class Quantizer(nn.Module):
    """Rounds each vector to the nearest entry of a learned codebook (van den Oord et al. 2017).

    size        K, the number of entries
    channels    C, the numbers in an entry
    commitment  weight of the loss that pulls the encoder towards the codebook
    warmup      training batches that pass without rounding; the next one sets the codebook
    """

    def __init__(self, size, channels, commitment=0.25, warmup=0):
        super().__init__()
        self.commitment = commitment
        self.warmup = warmup
        self.codebook = nn.Parameter(torch.randn(size, channels))  # (K, C)
        self.register_buffer("ready", torch.tensor(False))  # whether the codebook has been set
        self.register_buffer("batches", torch.tensor(0))  # training batches before it was set

    @torch.no_grad()
    def initialise(self, z):
        """Set the codebook to vectors drawn, with repetition, from the latents z (B, C, h, w).

        Several processes of torch.distributed all have to call it. They get one codebook, made of
        rank 0's z.
        """
        check_shape("z", z, "B", self.codebook.shape[1], "h", "w")
        if not z.isfinite().all():
            raise ValueError("z is not finite; expected latents that can start a codebook")
        vectors = z.float().permute(0, 2, 3, 1).flatten(0, 2)  # (B, C, h, w) -> (B*h*w, C)
        rows = torch.randint(len(vectors), (len(self.codebook),), device=z.device)
        chosen = vectors[rows]  # (K, C)

        # A vector may be drawn several times: there are often fewer vectors than entries (in the
        # preset `small` 1,024 and 8,192), and equal patches, such as plain sky, give equal vectors.
        # A little noise tells the copies apart.
        noise = 0.02 * vectors.std(unbiased=False) * torch.randn_like(chosen)
        self.codebook.copy_(chosen + noise)
        if dist.is_available() and dist.is_initialized():
            dist.broadcast(self.codebook.data, src=0)
        self.ready.fill_(True)

    @torch.no_grad()
    def nearest(self, vectors):
        """Vectors (M, C) -> indices of the nearest codebook entries, (M,) int64."""
        # At least float32: in half precision many entries would be equally near.
        dtype = torch.promote_types(vectors.dtype, torch.float32)
        vectors = vectors.to(dtype)
        codebook = self.codebook.to(dtype)
        # Distances stay the same if both move by the same vector, and floats are finer near 0.
        centre = codebook.mean(0)
        codebook = codebook - centre
        vectors = vectors - centre
        # |z - e|^2 = |z|^2 - 2 z.e + |e|^2, and |z|^2 is the same for all entries e.
        squares = codebook.pow(2).sum(1)  # (K,)
        with torch.autocast(vectors.device.type, enabled=False):
            scores = torch.addmm(squares, vectors, codebook.t(), alpha=-2)  # -> (M, K)
        return scores.argmin(1)

    def forward(self, z):
        """z (B, C, h, w) float -> z_q of z's shape and dtype, loss (scalar), indices (B, h, w).

        The loss holds the terms for codebook and commitment; indices are int64. As long as the
        codebook has not been set, z passes without rounding, with loss 0 and indices 0.
        """
        check_shape("z", z, "B", self.codebook.shape[1], "h", "w")
        if not z.is_floating_point():
            raise ValueError(f"z is {z.dtype}; expected floats")
        if self.training and not self.ready:
            self.batches += 1
            if self.batches > self.warmup:
                self.initialise(z)

        # In half precision the loss would be too coarse.
        B, C, h, w = z.shape
        dtype = torch.promote_types(z.dtype, torch.float32)
        with torch.autocast(z.device.type, enabled=False):
            vectors = z.to(dtype).permute(0, 2, 3, 1).reshape(-1, C)  # (B, C, h, w) -> (B*h*w, C)
            indices = self.nearest(vectors)  # (B*h*w,)
            entries = F.embedding(indices, self.codebook.to(dtype))  # (B*h*w, C)

            # The codebook moves to the encoder's outputs; the encoder commits to its entries.
            codebook_loss = F.mse_loss(entries, vectors.detach())
            commitment_loss = F.mse_loss(vectors, entries.detach())
            loss = codebook_loss + self.commitment * commitment_loss

            # Straight-through: the value of the entry, the gradient of the unrounded vector.
            rounded = entries.detach() + (vectors - vectors.detach())  # (B*h*w, C)

        # Contiguous, as the decoder's GroupNorm is slow in the permuted layout.
        z_q = rounded.view(B, h, w, C).permute(0, 3, 1, 2)  # (B*h*w, C) -> (B, C, h, w)
        z_q = z_q.to(z.dtype).contiguous()
        indices = indices.view(B, h, w)  # (B*h*w,) -> (B, h, w)

        # `where` and not `if`: then torch.compile and torch.export take it in eval mode.
        z_q = torch.where(self.ready, z_q, z)
        loss = torch.where(self.ready, loss, 0.0)
        indices = torch.where(self.ready, indices, 0)
        return z_q, loss, indices


def linear_encoder(factor, latent_channels):
    """Each latent number is a weighted sum of the 3f x 3f pixels around its position."""
    return nn.Sequential(
        nn.PixelUnshuffle(factor),  # (B, 3, S, S) -> (B, 3 f^2, S/f, S/f)
        nn.Conv2d(3 * factor**2, latent_channels, 3, padding=1),
    )


def middle(width):
    """The layers at the lowest resolution, in encoder and decoder alike."""
    return [ResidualBlock(width, width), PositionAttention(width), ResidualBlock(width, width)]


def deep_encoder(widths, blocks, latent_channels, patch):
    """Images (B, 3, S, S) -> latent (B, C, S/f, S/f), f = patch * 2^(levels - 1).

    widths: channels at each level, from full resolution down; blocks: residual blocks of each.
    """
    c = widths[0]
    layers = [nn.PixelUnshuffle(patch), nn.Conv2d(3 * patch**2, c, 3, padding=1)]

    for level, width in enumerate(widths):
        if level > 0:
            layers.append(nn.Conv2d(c, c, 3, stride=2, padding=1))  # halves the resolution
        for _ in range(blocks):
            layers.append(ResidualBlock(c, width))
            c = width

    layers += middle(c)
    layers += [group_norm(c), nn.SiLU(), nn.Conv2d(c, latent_channels, 3, padding=1)]
    return nn.Sequential(*layers)


def deep_decoder(widths, blocks, latent_channels, patch):
    """Latent (B, C, S/f, S/f) -> images (B, 3, S, S): the levels of deep_encoder in reverse, with
    one more residual block in each."""
    c = widths[-1]
    layers = [nn.Conv2d(latent_channels, c, 3, padding=1)]
    layers += middle(c)

    for level, width in reversed(list(enumerate(widths))):
        for _ in range(blocks + 1):
            layers.append(ResidualBlock(c, width))
            c = width
        if level > 0:
            layers.append(nn.Upsample(scale_factor=2))
            layers.append(nn.Conv2d(c, c, 3, padding=1))

    layers += [group_norm(c), nn.SiLU(), nn.Conv2d(c, 3 * patch**2, 3, padding=1)]
    layers.append(nn.PixelShuffle(patch))  # (B, 3 p^2, S/p, S/p) -> (B, 3, S, S)
    return nn.Sequential(*layers)


class VQAutoencoder(nn.Module):
    """Image -> small latent -> nearest codebook vectors -> image.

    channels         width at full resolution, a multiple of 32
    multipliers      level i has channels * multipliers[i]; the resolution has been halved i times
    blocks           residual blocks of each level; the decoder has one more
    latent_channels  C
    codebook_size    K
    commitment       weight of the commitment loss
    patch            side of the squares of pixels that become channels at the input;
                     f = patch * 2^(levels - 1)
    linear           whether the encoder is a single 3x3 convolution on the grid of squares of f x f
                     pixels; `channels`, `multipliers` and `blocks` are then the decoder's
    warmup           training batches without rounding
    """

    def __init__(self, channels=32, multipliers=(1, 2, 4), blocks=2, latent_channels=3,
                 codebook_size=2048, commitment=0.25, patch=1, linear=False, warmup=200):
        super().__init__()
        self.factor = patch * 2 ** (len(multipliers) - 1)
        self.latent_channels = latent_channels
        widths = [channels * multiplier for multiplier in multipliers]

        if linear:
            self.encoder = linear_encoder(self.factor, latent_channels)
        else:
            self.encoder = deep_encoder(widths, blocks, latent_channels, patch)
        self.quantizer = Quantizer(codebook_size, latent_channels, commitment, warmup)
        self.decoder = deep_decoder(widths, blocks, latent_channels, patch)

    def adamw_layers(self):
        """For train.py, whose optimizer Muon leaves these to AdamW: the first and the last layer
        of encoder and decoder. ([0] of the encoder and [-1] of the decoder have no weights.)"""
        return [self.encoder[1], self.encoder[-1], self.decoder[0], self.decoder[-2]]

    def encode(self, x):
        """Images (B, 3, S, S) in [-1, 1] -> latent before quantisation (B, C, S/f, S/f)."""
        check_images(x, self.factor)
        return self.encoder(x)

    def quantize(self, z):
        """-> z_q of z's shape, the quantizer's loss (scalar), indices (B, S/f, S/f) int64."""
        return self.quantizer(z)

    def decode(self, z):
        """Latent (B, C, S/f, S/f), quantised here -> images (B, 3, S, S), about [-1, 1]."""
        z_q, _, _ = self.quantize(z)
        return self.decoder(z_q)

    def forward(self, x):
        """-> reconstruction of x's shape, the quantizer's loss (scalar), indices (B, S/f, S/f)."""
        z_q, loss, indices = self.quantize(self.encode(x))
        return self.decoder(z_q), loss, indices


class FirstStageLoss(nn.Module):
    """The loss of the first stage: L1 + squared * L2 + the quantizer's loss.

    images (B, 3, S, S) in [-1, 1] -> loss (scalar), reconstruction, indices
    squared  weight of the mean squared error, L2
    """

    def __init__(self, autoencoder, squared=0.0):
        super().__init__()
        self.autoencoder = autoencoder
        self.squared = squared

    def forward(self, images):
        reconstruction, quantizer_loss, indices = self.autoencoder(images)
        reconstruction = reconstruction.float()
        images = images.float()

        l1 = F.l1_loss(reconstruction, images)
        l2 = F.mse_loss(reconstruction, images)
        return l1 + self.squared * l2 + quantizer_loss, reconstruction, indices


def codebook_usage(counts):
    """How often each entry was chosen in many batches, counts (K,) -> two numbers.

    The share of entries that are used, in [0, 1]; and the perplexity, in [1, K]: the number of
    equally used entries that would have the same entropy. ValueError: there are no counts, or
    negative ones.
    """
    counts = torch.as_tensor(counts).cpu().double()  # MPS has no doubles
    if not len(counts) or not (counts >= 0).all():
        raise ValueError("counts are missing or negative; expected (K,), how often each was chosen")
    share_used = (counts > 0).double().mean()
    p = counts / counts.sum().clamp(min=1)
    entropy = -(p * p.clamp(min=1e-12).log()).sum()
    return share_used.item(), entropy.exp().item()


# The kinds of first stage: the paper's sizes, and those of the preset `small`.
KINDS = {
    "deep": VQAutoencoder,
    "linear": functools.partial(VQAutoencoder, channels=64, multipliers=(1, 1), blocks=1,
                                latent_channels=4, codebook_size=8192, patch=4, linear=True),
}


# ---- Autoencoders that it is compared with (Table 1). Skip on first reading. --------------------


def check_shape(name, tensor, *expected):
    """ValueError unless the tensor has this shape; a letter stands for any size."""
    shape = tuple(getattr(tensor, "shape", ()))
    fits = len(shape) == len(expected) and all(
        isinstance(size, str) or n == size for n, size in zip(shape, expected))

    if not fits:
        sizes = str(expected).replace("'", "")
        raise ValueError(f"{name} has shape {shape}; expected {sizes}")


def check_images(images, factor):
    """ValueError unless these are images, floats, whose sides are multiples of this factor."""
    check_shape("images", images, "B", 3, "S", "S")
    if not torch.is_tensor(images) or not images.is_floating_point():
        raise ValueError(f"images are {images.dtype}; expected a tensor of floats in [-1, 1]")
    h, w = images.shape[2:]
    if h % factor != 0 or w % factor != 0:
        raise ValueError(f"images have {h} x {w} pixels; expected multiples of {factor}")


class Pixels(nn.Module):
    """No first stage: the pixels are rearranged, (B, 3, S, S) -> (B, 3 f^2, S/f, S/f), and back."""

    def __init__(self, factor=8):
        super().__init__()
        self.factor = factor
        self.latent_channels = 3 * factor**2
        self.encode = nn.PixelUnshuffle(factor)
        self.decode = nn.PixelShuffle(factor)


# Weights of the VAEs' penalties. Of beta 1 to 64, gamma 30 to 1000, beta 1 to 15 and gamma 1 to 100
# these gave seed 0 the highest DCI after 3,000 steps.
VAE_WEIGHTS = {"beta": 32.0, "annealed": 100.0, "tc": 3.0, "factor": 10.0}
CAPACITY = 25.0  # AnnealVAE's C at the end, in nats (Burgess et al. 2018)
RISES = 0.5  # share of the training steps in which C rises from 0


def log_normal(z, mean, log_var):
    """log N(z; mean, exp(log_var)) of each number, in nats."""
    return -((z - mean) ** 2 / log_var.exp() + log_var + math.log(2 * math.pi)) / 2


def total_correlation_of_batch(z, mean, log_var):
    """KL(q(z) || q(z_1) ... q(z_N)) in nats, a scalar: how far codes depend on each other (Chen et
    al. 2018).

    z, mean, log_var  (B, N) each: z is drawn from q(z|x) = N(mean, exp(log_var))

    By minibatch-weighted sampling: q(z) is the mean of q(z|x) over the images of the batch. The
    paper divides by the number of images of the dataset, too, which changes no gradient.
    """
    B = len(z)
    log_q = log_normal(z[:, None], mean, log_var)  # (B, 1, N) -> (B, B, N): q(z_i | x_j) at [i, j]
    log_q_z = log_q.sum(2).logsumexp(1) - math.log(B)  # log q(z_i): (B, B) -> (B,)
    log_q_each = log_q.logsumexp(1) - math.log(B)  # of each dimension alone: (B, N)

    return (log_q_z - log_q_each.sum(1)).mean()


class Discriminator(nn.Module):
    """FactorVAE's (Kim & Mnih 2018): tells codes from codes that were permuted across the batch.

    z (B, N) -> (B,), an estimate of log q(z) / (q(z_1) ... q(z_N)), whose mean over q(z) is the
    total correlation of z. Three hidden layers of 256 units; in that paper, six of 1000.
    """

    def __init__(self, num_codes, width=256):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(num_codes, width),
            nn.LeakyReLU(0.2),
            nn.Linear(width, width),
            nn.LeakyReLU(0.2),
            nn.Linear(width, width),
            nn.LeakyReLU(0.2),
            nn.Linear(width, 1),
        )

    def forward(self, z):
        return self.layers(z)[:, 0].float()  # (B, N) -> (B, 1) -> (B,)

    def total_correlation(self, z):
        """The estimate for z (B, N), a scalar in nats; its gradient does not reach the weights."""
        frozen = {name: weight.detach() for name, weight in self.named_parameters()}
        return torch.func.functional_call(self, frozen, z).mean()

    def loss(self, z):
        """Cross-entropy of its guesses, a scalar; the gradient does not reach z (B, N)."""
        z = z.detach()
        # Each code is taken from an image of its own, so the codes are independent.
        order = torch.rand_like(z).argsort(dim=0)
        permuted = z.gather(0, order)  # (B, N)
        return (F.softplus(-self(z)).mean() + F.softplus(self(permuted)).mean()) / 2


class VAE(nn.Module):
    """beta-VAE, AnnealVAE, beta-TCVAE or FactorVAE, with the methods of EncDiff.

    encoder    images (B, 3, S, S) in [-1, 1] -> (B, 2N): N means, then N log variances
    num_codes  N
    objective  a key of VAE_WEIGHTS, else ValueError
    steps      of the whole training, in half of which AnnealVAE's C rises
    size       side S of the images, a multiple of 16
    width      channels of the decoder

    The latent is the code (B, N), a mean, and the target is the image itself. So there is no
    timestep, first stage or sampler. After `loss`, `terms` has floats for the log.
    """

    def __init__(self, encoder, num_codes, objective="beta", steps=1, size=64, width=64):
        super().__init__()
        if objective not in VAE_WEIGHTS:
            raise ValueError(f"objective is {objective!r}; expected {', '.join(VAE_WEIGHTS)}")
        if size % 16 != 0:
            raise ValueError(f"size is {size}; expected a multiple of 16")
        self.encoder = encoder
        self.objective = objective
        self.steps = max(1, steps)
        self.latent_shape = (num_codes,)
        self.terms = {}
        self.register_buffer("step", torch.tensor(0))  # training steps done, kept in checkpoints

        low = size // 16  # the resolution that four layers double
        self.decoder = nn.Sequential(
            nn.Linear(num_codes, 256),
            nn.ReLU(),
            nn.Linear(256, width * low**2),
            nn.ReLU(),
            nn.Unflatten(1, (width, low, low)),  # (B, width low^2) -> (B, width, low, low)
            nn.ConvTranspose2d(width, width, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.ConvTranspose2d(width, width, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.ConvTranspose2d(width, width, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.ConvTranspose2d(width, 3, 4, stride=2, padding=1),
        )
        self.discriminator = Discriminator(num_codes) if objective == "factor" else None

    def adamw_layers(self):
        """Where the networks begin and end, and the whole discriminator: see VQAutoencoder."""
        layers = [*self.encoder.adamw_layers(), self.decoder[0], self.decoder[-1]]
        if self.discriminator is not None:
            layers.append(self.discriminator)
        return layers

    def represent(self, images):
        """images (B, 3, S, S) in [-1, 1] -> codes (B, N), the means of q(z|x)."""
        mean, _ = self.encoder(images).chunk(2, dim=1)  # (B, 2N) -> 2x (B, N)
        return mean

    def set_latent_scale(self, images):
        """A code needs no scale: the KL term gives it one."""

    def latents(self, images):
        """The codes are the latent."""
        return self.represent(images)

    def tokens(self, codes):
        """The decoder reads the codes as they are."""
        return codes

    def loss(self, images, t=None, noise=None):
        """-log p(x|z) of Bernoulli pixels + penalty, in nats for each number of an image: a scalar.

        images (B, 3, S, S) in [-1, 1]; noise (B, N) is drawn unless given; t is not used.
        For FactorVAE it contains the discriminator's loss. No weight is trained by both.
        """
        # A code for each image, drawn from q(z|x).
        mean, log_var = self.encoder(images).float().chunk(2, dim=1)  # (B, 2N) -> 2x (B, N)
        if noise is None:
            noise = torch.randn_like(mean)
        z = mean + (log_var / 2).exp() * noise

        # -log p(x|z), summed over an image.
        logits = self.decoder(z.to(images.dtype)).float()
        target = (images.float() + 1) / 2
        error = F.binary_cross_entropy_with_logits(logits, target, reduction="sum") / len(images)

        # KL(q(z|x) || N(0, I)), and the part of it that says how the codes depend on each other.
        kl = (mean**2 + log_var.exp() - 1 - log_var).sum(1).mean() / 2
        if self.discriminator is None:
            total_correlation = total_correlation_of_batch(z, mean, log_var)
        else:
            total_correlation = self.discriminator.total_correlation(z.to(images.dtype))
        self.terms = {"kl": kl.item(), "total_correlation": total_correlation.item()}

        # Divided by the numbers in an image, gradients are about as large as those of eq. (3).
        if self.training:
            self.step += 1
        loss = (error + self.penalty(kl, total_correlation)) / images[0].numel()
        if self.discriminator is not None:
            loss = loss + self.discriminator.loss(z.to(images.dtype))
        return loss

    def forward(self, images, t=None, noise=None):
        return self.loss(images, t, noise)  # under the name that DistributedDataParallel calls

    def penalty(self, kl, total_correlation):
        """What the objective adds to -log p(x|z), in nats an image, from two scalars in nats."""
        weight = VAE_WEIGHTS[self.objective]
        if self.objective == "beta":  # Higgins et al. 2017
            return weight * kl
        if self.objective == "annealed":
            # Eq. (6) is E log p(x|z) - gamma |KL(q(z|x) || p(z)) - C|, which AnnealVAE maximises.
            share = self.step / (RISES * self.steps)
            C = CAPACITY * share.clamp(max=1)
            return weight * (kl - C).abs()
        if self.objective == "tc":  # Chen et al. 2018: the total correlation counts `weight` times
            return kl + (weight - 1) * total_correlation
        return kl + weight * total_correlation  # FactorVAE, Kim & Mnih 2018

    @torch.no_grad()
    def decode(self, z):
        """codes (B, N) -> images (B, 3, S, S) in [-1, 1]."""
        return self.decoder(z).float().sigmoid() * 2 - 1

    def sample(self, tokens, steps=1, sampler="none", noise=None, eta=0.0):
        """codes (B, N) -> images (B, 3, S, S) in [-1, 1], in one pass: the others are not used."""
        return self.decode(tokens)


if __name__ == "__main__":
    torch.manual_seed(0)
    model = VQAutoencoder()
    x = torch.rand(2, 3, 64, 64) * 2 - 1
    z = model.encode(x).detach().requires_grad_()
    model.quantizer.initialise(z)
    z_q, _, _ = model.quantize(z)
    count = sum(p.numel() for p in model.parameters())
    print(f"image {tuple(x.shape)} -> latent {tuple(z.shape)} -> rounded {tuple(z_q.shape)}, "
          f"{count:,} parameters")

    z_q.sum().backward()
    print(f"gradient through rounding: {z.grad.unique().tolist()} (expected [1.0])")
