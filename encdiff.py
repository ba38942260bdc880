"""EncDiff: an image becomes N scalars, the scalars tokens, and a diffusion model draws from them.

WHERE     Read first; then unet.py (the denoiser), train.py and vq.py (the latent space). Imports
          torch alone: encoder, first stage and denoiser are handed to EncDiff, so copy it freely.
PAPER     arXiv 2402.09712, Sec. 3 and Table 6; the variants of Sec. 4.4 and of Tables 11 and 12.
          Equation numbers are the paper's; (7) to (12) are background, and no code computes them.
SHAPES    B images, N tokens of width d, latents (C, h, w), n = C*h*w numbers each, T timesteps.
          Images are (B, 3, size, size), float, in [-1, 1].
SYMBOLS   z_0        z0                (B, C, h, w)  latent of the image, divided by `latent_std`
          z_t        z_t               (B, C, h, w)  z_0 with noise, t = 1..T
          eps        noise             (B, C, h, w)  the noise in z_t, N(0, I)
          beta_t     betas[t - 1]      (T,)          variance added in step t
          abar_t     alpha_bar[t]      (T + 1,)      share of signal variance left; alpha_bar[0] = 1
                     codes             (B, N)        the N scalars of an image
          S          tokens            (B, N, d)     concept tokens
IDEA      Encoder and denoiser learn together to predict noise, eq. (3). Nothing in that loss asks
          for disentanglement. Three parts of the model are meant to bring it about. First,
          attention: at each position the tokens compete for a softmax, so the loss is lower if a
          token means one thing. Second, scalars: each token is a function of ONE number, so it has
          no second dimension in which to put a second factor. Third, noise: z_t shows the image
          too, but covered by noise, and the tokens are the denoiser's only view of it WITHOUT
          NOISE. Where z_t is too noisy to show something, only the tokens can supply it. So the
          noise decides what a token is needed for: `python encdiff.py --bayes`. The paper names the
          first and the third. It calls the noise a bottleneck, as a step of the sampler can pass on
          only so much information: eq. (5), in `kl_bottleneck`.
DIFFERS   Eq. (3) is printed without the square; Table 7 says MSE, and so do we. While sampling, an
          estimate of z_0 is scaled back if its root mean square is larger than that of any latent
          that `set_latent_scale` saw. By default 20 steps of DPM-Solver++ draw an image; the paper
          takes 200 steps.
TRY       python encdiff.py           ->   the whole method on 8x8 pictures while you watch
          python encdiff.py --bayes   ->   what a token is needed for, at each timestep, computed
"""
import argparse
import functools
import math

import torch
import torch.nn as nn
import torch.nn.functional as F


# ---- The encoder: image -> N scalars -> N concept tokens ----------------------------------------


class CNNEncoder(nn.Module):
    """The paper's encoder (Table 6): images (B, 3, size, size) -> codes (B, outputs)."""

    def __init__(self, outputs, size=64, width=64):
        super().__init__()
        widths = [width, 2 * width, 4 * width, 4 * width, 4 * width]
        layers = [
            nn.Conv2d(3, width, 7, padding=3),
            nn.ReLU(inplace=True),
        ]
        for c_in, c_out in zip(widths, widths[1:]):  # each halves the resolution
            layers.append(nn.Conv2d(c_in, c_out, 4, stride=2, padding=1))
            layers.append(nn.ReLU(inplace=True))

        features = 4 * width * (size // 16) ** 2  # 4096 at the paper's size
        self.layers = nn.Sequential(
            *layers,
            nn.Flatten(),
            nn.Linear(features, 256),
            nn.ReLU(inplace=True),
            nn.Linear(256, 256),
            nn.ReLU(inplace=True),
            nn.Linear(256, outputs),
        )

    def forward(self, images):
        return self.layers(images)

    def adamw_layers(self):
        """For train.py, no part of the method: the layers that Muon, its optimizer, leaves to
        AdamW."""
        return [self.layers[-1]]


class ScalarTokens(nn.Module):
    """N small MLPs, 1 -> 64 -> 128 -> d with ELU: codes (B, N) -> concept tokens (B, N, d).

    No two tokens share a weight. Attention does not see the order of the tokens, so it is a token's
    own MLP that says which token it is. With width_in above 1, codes are (B, N, width_in).
    ValueError for codes of another shape.
    """

    def __init__(self, num_tokens, token_dim, width_in=1):
        super().__init__()
        widths = (width_in, 64, 128, token_dim)

        # One tensor holds a layer of all N MLPs: one batched product in place of N small ones.
        self.weights = nn.ParameterList()
        self.biases = nn.ParameterList()
        for c_in, c_out in zip(widths, widths[1:]):
            limit = c_in**-0.5  # as nn.Linear initialises
            weight = torch.empty(num_tokens, c_in, c_out).uniform_(-limit, limit)
            bias = torch.empty(num_tokens, 1, c_out).uniform_(-limit, limit)
            self.weights.append(nn.Parameter(weight))
            self.biases.append(nn.Parameter(bias))

    def forward(self, codes):
        N, width_in = self.weights[0].shape[:2]
        shape = codes.shape
        if codes.ndim == 2:
            codes = codes[:, :, None]  # (B, N) -> (B, N, 1)
        if codes.shape[1:] != (N, width_in):
            expected = f"(B, {N})" if width_in == 1 else f"(B, {N}, {width_in})"
            raise ValueError(f"codes have shape {tuple(shape)}; expected {expected}")

        x = codes.transpose(0, 1)  # (B, N, 1) -> (N, B, 1)
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases)):
            if layer > 0:
                x = F.elu(x)
            x = torch.baddbmm(bias, x, weight)  # x @ weight + bias: (N, B, c_in) -> (N, B, c_out)
        return x.transpose(0, 1)  # (N, B, d) -> (B, N, d)


# ---- The noise schedules, eq. (1) ---------------------------------------------------------------

SCHEDULES = ("cosine", "linear", "sqrt_linear", "sqrt")


def beta_schedule(name, steps=1000, start=0.0015, end=0.0155):
    """beta_1..beta_T of Eq. (1): q(z_t | z_{t-1}) = N(sqrt(1 - beta_t) z_{t-1}, beta_t I).

    name          one of SCHEDULES, else ValueError. The names are the latent diffusion code's, and
                  odd: "linear" is linear in sqrt(beta), "sqrt_linear" is the straight line.
    steps         T, 1 or more, else ValueError
    start, end    beta_1 and beta_T of "linear" and "sqrt_linear" with T = 1000; "sqrt" takes the
                  roots of the straight line. For another T one step does what 1000 / T of these
                  steps do, so that abar_T is about the same from T = 10 on.

    Returns a float64 tensor (steps,).
    """
    if steps < 1:
        raise ValueError(f"{steps} timesteps; expected 1 or more")
    if name == "cosine":  # Nichol & Dhariwal 2021: abar_t falls as a squared cosine
        t = torch.arange(steps + 1, dtype=torch.float64) / steps
        angle = (t + 0.008) / 1.008 * math.pi / 2
        f = torch.cos(angle) ** 2  # abar_t is f(t) / f(0)
        betas = 1 - f[1:] / f[:-1]
        return betas.clamp(max=0.999)  # a beta of 1 would leave no signal at all

    line = torch.linspace(start, end, steps, dtype=torch.float64)
    if name == "linear":
        roots = torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64)
        betas = roots**2
    elif name == "sqrt_linear":
        betas = line
    elif name == "sqrt":
        betas = line.sqrt()
    else:
        names = ", ".join(SCHEDULES)
        raise ValueError(f"schedule is {name!r}; expected one of {names}")
    return 1 - (1 - betas) ** (1000 / steps)


def alpha_bars(betas):
    """betas (T,) -> alpha_bar (T + 1,) with alpha_bar[0] = 1, so that alpha_bar[t] is abar_t."""
    return torch.cat([betas.new_ones(1), (1 - betas).cumprod(0)])


# ---- The model, eq. (2)-(3) ---------------------------------------------------------------------


def expand(values, z):
    """values (B,), one for each image of z (B, C, h, w) -> (B, 1, 1, 1), to multiply z with."""
    ones = [1] * (z.ndim - 1)
    return values.reshape(-1, *ones)


def check_floats(images):
    """ValueError unless images are a tensor of floats. Bytes, 0 to 255, would be far too large."""
    if not torch.is_tensor(images) or not images.is_floating_point():
        found = getattr(images, "dtype", type(images).__name__)
        raise ValueError(f"images are {found}; expected a tensor of floats in [-1, 1]")


class EncDiff(nn.Module):
    """Encoder, token map and denoiser, in the latent space of a frozen first stage.

    first_stage   encode(images) -> latents, decode(latents) -> images (vq.VQAutoencoder)
    encoder       images -> codes (B, N)
    token_map     codes (B, N) -> concept tokens (B, N, d)
    denoiser      (z_t, t, tokens) -> the noise in z_t (unet.UNet)
    latent_shape  (C, h, w)
    schedule      a name for beta_schedule; timesteps: T

    After `.half()` or `.bfloat16()`, which are too coarse for abar_t, `loss`, `add_noise` and
    `sample` raise ValueError, and `sample` still does after `.half().float()`. Use torch.autocast.
    Encoder and denoiser of your own need `adamw_layers` only for train.py's optimizers.
    """

    def __init__(self, first_stage, encoder, token_map, denoiser, latent_shape=(3, 16, 16),
                 schedule="cosine", timesteps=1000):
        super().__init__()
        self.first_stage = first_stage.requires_grad_(False).eval()
        self.encoder = encoder
        self.token_map = token_map
        self.denoiser = denoiser
        self.latent_shape = tuple(latent_shape)

        alpha_bar = alpha_bars(beta_schedule(schedule, timesteps))
        self.register_buffer("alpha_bar", alpha_bar.to(torch.get_default_dtype()))
        self.register_buffer("latent_std", torch.ones(()))  # set by `set_latent_scale`
        # Used by `estimate_z0`. At first it is so large that it is no limit. It is not infinite, as
        # train.py averages it like the weights, and infinity minus infinity is NaN.
        self.register_buffer("largest_rms", torch.tensor(1e30))

    def train(self, mode=True):
        super().train(mode)
        self.first_stage.eval()  # it is frozen, so it stays in eval mode
        return self

    def adamw_layers(self):
        """For train.py: the denoiser's first and last layer, the encoder's last one, and the token
        map."""
        return [*self.encoder.adamw_layers(), self.token_map, *self.denoiser.adamw_layers()]

    @torch.no_grad()
    def set_latent_scale(self, images):
        """Before training: the std of all latents of images (B, 3, size, size) becomes the unit of
        z_0, and the largest root mean square of one of them the limit of `estimate_z0`.

        ValueError: images are no floats; the latents have another shape than latent_shape, or a
        std of 0 or NaN.
        """
        check_floats(images)
        parts = [self.first_stage.encode(part) for part in images.split(64)]
        latents = torch.cat(parts).float()
        if latents.shape[1:] != self.latent_shape:
            shape = tuple(latents.shape[1:])
            raise ValueError(
                f"latents have shape {shape}; "
                f"expected {self.latent_shape}, EncDiff's latent_shape")

        std = latents.std()
        if not 0 < std < math.inf:
            raise ValueError(f"the latents of these images have a std of {std}; expected images "
                             "that differ")
        rms = latents.flatten(1).square().mean(1).sqrt()  # (B,): root mean square of each
        self.latent_std.copy_(std)
        self.largest_rms.copy_(rms.max() / std)

    @torch.no_grad()
    def latents(self, images):
        """images -> z_0 (B, C, h, w), in units of latent_std. It is not rounded to the first
        stage's codebook; the first stage does that when it decodes."""
        check_floats(images)
        return self.first_stage.encode(images).to(self.alpha_bar.dtype) / self.latent_std

    def represent(self, images):
        """images -> codes (B, N), what the encoder knows of each image."""
        check_floats(images)
        return self.encoder(images)

    def tokens(self, codes):
        """codes, as from `represent` -> concept tokens (B, N, d)."""
        return self.token_map(codes)

    def abar(self, t):
        """abar_t of timesteps t, an int or (B,) int64 -> a tensor of t's shape."""
        if self.alpha_bar.dtype in (torch.float16, torch.bfloat16):
            raise ValueError("EncDiff is in half precision, too coarse for abar_t; expected "
                             "float32 weights, and torch.autocast for speed")
        return self.alpha_bar[t]

    def add_noise(self, z0, t, noise):
        """Eq. (2): z_t = sqrt(abar_t) z_0 + sqrt(1 - abar_t) eps; t (B,) int64 in 1..T.

        z0 and noise (B, C, h, w), or any other shape that both have, else ValueError.
        """
        if noise.shape != z0.shape:
            raise ValueError(f"noise has shape {tuple(noise.shape)}; expected that of the latents, "
                             f"{tuple(z0.shape)}")
        abar = expand(self.abar(t), z0)
        return abar.sqrt() * z0 + (1 - abar).sqrt() * noise

    def loss(self, images, t=None, noise=None):
        """Eq. (3), E |eps - eps_theta(z_t, t, S)|^2, as a mean over batch and latent: a scalar.

        images (B, 3, size, size) in [-1, 1]; t (B,) int64 in 1..T and noise (B, C, h, w) are drawn
        unless given.
        """
        z0 = self.latents(images)
        if t is None:
            t = torch.randint(1, len(self.alpha_bar), (len(z0),), device=z0.device)  # t ~ U{1..T}
        if noise is None:
            noise = torch.randn_like(z0)

        codes = self.represent(images)  # (B, N), the only view of the image without noise
        z_t = self.add_noise(z0, t, noise)  # Eq. (2)
        predicted = self.denoiser(z_t, t, self.tokens(codes))
        return F.mse_loss(predicted.to(noise.dtype), noise)  # Eq. (3)

    def forward(self, images, t=None, noise=None):
        """The loss: DistributedDataParallel averages gradients of what `forward` returns."""
        return self.loss(images, t, noise)

    def estimate_z0(self, z_t, t, tokens):
        """z_t (B, C, h, w) at timestep t, an int -> the denoiser's estimate of z_0, for sampling.

        Eq. (2) solved for z_0 divides by sqrt(abar_t). Near t = T that is almost nothing, for
        cosine 1 / 20,291: an error of 0.01 in the noise becomes 200 in z_0. So an estimate with a
        larger root mean square than all latents that `set_latent_scale` saw is scaled back to
        theirs. This is ours; the paper does not say what it does.
        """
        times = torch.full((len(z_t),), t, device=z_t.device)
        noise = self.denoiser(z_t, times, tokens).to(z_t.dtype)
        abar = self.abar(t)

        signal = z_t - (1 - abar).sqrt() * noise  # Eq. (2): sqrt(abar_t) z_0
        rms = signal.flatten(1).square().mean(1).sqrt().clamp(min=1e-20)  # (B,)
        # Times 1 / sqrt(abar_t) it is z_0. Times largest_rms / rms it has the largest rms that is
        # allowed. The smaller of the two is taken.
        multiplier = torch.minimum(1 / abar.sqrt(), self.largest_rms / rms)
        return signal * expand(multiplier, z_t)

    @torch.no_grad()
    def sample(self, tokens, steps=20, sampler="dpm", noise=None, eta=0.0):
        """Concept tokens (B, N, d) -> images (B, 3, size, size) in [-1, 1].

        Call `eval()` first: in training mode the denoiser's dropout is active.

        steps     passes of the denoiser, 1 to T (ddpm: always T). For the schedule "cosine" about
                  20 are enough, for "linear" and "sqrt_linear" about 100; for "sqrt" take all T.
                  The last step returns the mean of all images that are possible, so what is smaller
                  than its noise is blurred.
        sampler   "ddpm", "ddim" or "dpm" (DPM-Solver++), else ValueError
        noise     z_T (B, C, h, w), drawn unless given
        eta       of ddim: 0 is deterministic, 1 draws as much noise as ddpm
        """
        if sampler not in SAMPLERS:
            names = ", ".join(SAMPLERS)
            raise ValueError(f"sampler is {sampler!r}; expected one of {names}")
        options = {}
        if sampler == "ddim":
            if not 0 <= eta <= 1:
                raise ValueError(f"eta is {eta}; expected 0 to 1")
            options = {"eta": eta}
        elif eta:
            raise ValueError(f"eta is {eta} with sampler {sampler!r}; expected sampler 'ddim'")
        for coarse in (torch.float16, torch.bfloat16):  # images would be a little wrong, or NaN
            rounded = self.alpha_bar.to(coarse).to(self.alpha_bar.dtype)
            if rounded.equal(self.alpha_bar) and len(rounded) > 16:  # few may be round by chance
                raise ValueError("EncDiff is or was in half precision, too coarse for abar_t; "
                                 "expected float32 weights from the start")
        if noise is None:
            noise = torch.randn(len(tokens), *self.latent_shape, device=tokens.device)
        noise = noise.to(self.alpha_bar.dtype)  # of a model in double precision, double

        estimate = functools.partial(self.estimate_z0, tokens=tokens)
        z0 = SAMPLERS[sampler](estimate, self.alpha_bar, noise, steps, **options)
        return self.decode(z0)

    @torch.no_grad()
    def decode(self, z0):
        """z_0 (B, C, h, w), in units of latent_std -> images (B, 3, size, size) in [-1, 1]."""
        return self.first_stage.decode(z0 * self.latent_std).float().clamp(-1, 1)


# ---- Samplers, each a short function, eq. (4) ----------------------------------------------------
# estimate(z_t, t) guesses z_0 from z_t (B, C, h, w) at timestep t, an int. All start at z_T = z
# (B, C, h, w), include t = T, add no noise in their last step, and return z_0 (B, C, h, w). The
# one that `sample` takes by default, dpm_solver, needs fewer steps; it is defined further down.


def timesteps_down(T, steps):
    """`steps` (1 to T, else ValueError) evenly spaced timesteps from T down, then 0: a list."""
    if not 1 <= steps <= T:
        raise ValueError(f"steps is {steps}; expected 1 to {T}, the timesteps of the schedule")
    return [round(T * (1 - i / steps)) for i in range(steps + 1)]


def posterior(alpha_bar, t):
    """Eq. (4): q(z_{t-1} | z_t, z_0) = N(a z_0 + b z_t, v I) -> coefficients a, b and variance v.

    alpha_bar (T + 1,), t int or int64 tensor in 1..T; a, b, v of t's shape. v is 0 at t = 1.
    """
    abar = alpha_bar[t]
    abar_before = alpha_bar[t - 1]
    alpha = abar / abar_before  # alpha_t = 1 - beta_t

    a = abar_before.sqrt() * (1 - alpha) / (1 - abar)  # sqrt(abar_{t-1}) beta_t / (1 - abar_t)
    b = alpha.sqrt() * (1 - abar_before) / (1 - abar)
    v = (1 - abar_before) / (1 - abar) * (1 - alpha)  # beta~_t
    return a, b, v


def ddpm(estimate, alpha_bar, z, steps=None):
    """Ancestral sampling, DDPM (Ho et al. 2020) Algorithm 2: every one of the T timesteps."""
    for t in range(len(alpha_bar) - 1, 0, -1):
        a, b, v = posterior(alpha_bar, t)
        z = a * estimate(z, t) + b * z  # the mean of Eq. (4), with the estimate in the place of z_0
        if t > 1:
            z = z + v.sqrt() * torch.randn_like(z)
    return z


def ddim(estimate, alpha_bar, z, steps, eta=0.0):
    """DDIM (Song et al. 2021, eq. 12 and 16): eta 0 is deterministic, 1 has DDPM's variance."""
    ts = timesteps_down(len(alpha_bar) - 1, steps)
    for t, s in zip(ts, ts[1:]):  # from t to the smaller s
        abar_t = alpha_bar[t]
        abar_s = alpha_bar[s]
        z0 = estimate(z, t)
        noise = (z - abar_t.sqrt() * z0) / (1 - abar_t).sqrt()  # Eq. (2) solved for eps

        variance = (1 - abar_s) / (1 - abar_t) * (1 - abar_t / abar_s)  # of a step of DDPM
        sigma = eta * variance.sqrt()
        kept = (1 - abar_s - sigma**2).clamp(min=0)  # variance of the noise that stays
        z = abar_s.sqrt() * z0 + kept.sqrt() * noise
        if s > 0:
            z = z + sigma * torch.randn_like(z)
    return z


# ---- The toy: the whole method on 8x8 pictures, python encdiff.py --------------------------------
# The latent is the picture itself, so there is no first stage. The loss of EncDiff is written out
# once more, so that all of the training stands in one function. Nothing is sampled.


def room(factors):
    """A wall, a floor and a block in front: factors (B, 3 or 4), integers 0..4 -> (B, 3, 8, 8).

    The factors are the colours of wall, floor and block, and the block's place. Without a place the
    block stands in the middle. Wall and floor are in [-1, 1], the block is brighter, 2 to 4.
    """
    colours = factors[:, :3] / 2 - 1  # (B, 3), in [-1, 1]
    wall, floor, block = colours[:, :, None, None].unbind(1)  # (B, 1, 1) each
    picture = torch.empty(len(factors), 3, 8, 8)
    red, green, blue = picture.unbind(1)  # (B, 8, 8) each; what is written there is in `picture`

    # The upper half is wall, the lower half floor. Their colours raise one channel and lower
    # another; that of the block raises all three.
    red[:, :4] = wall
    green[:, :4] = -wall
    blue[:, :4] = 0.5
    red[:, 4:] = -0.5
    green[:, 4:] = floor
    blue[:, 4:] = -floor

    # The block covers the four rows in the middle, and four columns from its place on.
    place = factors[:, 3:] if factors.shape[1] == 4 else torch.tensor([[2]])
    column = torch.arange(8)
    inside = (place <= column) & (column < place + 4)  # (B, 8), or (1, 8) without a place
    inside = inside[:, None, None]  # -> (B, 1, 1, 8)
    block = block[:, None]  # -> (B, 1, 1, 1)
    rows = picture[:, :, 2:6]  # (B, 3, 4, 8); what is written there is in `picture`, too
    rows[:] = torch.where(inside, 3 + block, rows)
    return picture


class ToyDenoiser(nn.Module):
    """One layer of cross-attention and an MLP; each of the 64 positions works for itself."""

    def __init__(self, attention=True, width=32, token_dim=16):
        super().__init__()
        self.attention = attention
        self.position = nn.Parameter(0.6 * torch.randn(64, width))
        self.pixel = nn.Linear(3, width)
        self.time = nn.Linear(32, width)
        self.norm = nn.LayerNorm(width)
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(token_dim, width)
        self.v = nn.Linear(token_dim, width)
        self.mix = nn.Linear(width, width)
        self.output = nn.Linear(width, 3)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 64),
            nn.GELU(),
            nn.Linear(64, width),
        )

    def forward(self, z_t, t, tokens):
        """z_t (B, 3, 8, 8), t (B,), tokens (B, N, token_dim) -> the prediction (B, 3, 8, 8)."""
        # A position knows its pixel, where it is, and the timestep.
        frequencies = 1000 ** (-torch.arange(16) / 16)
        angles = t[:, None] * frequencies  # (B, 16)
        time = self.time(torch.cat([angles.cos(), angles.sin()], dim=1))  # (B, width)
        pixels = z_t.flatten(2).mT  # (B, 3, 8, 8) -> (B, 64, 3)
        x = self.pixel(pixels) + self.position + time[:, None]  # (B, 64, width)

        # Cross-attention: the weights of a position, one for each token, sum to 1.
        q = self.q(self.norm(x))  # (B, 64, width)
        k = self.k(tokens)  # (B, N, width)
        v = self.v(tokens)
        scale = k.shape[2] ** -0.5
        weights = (q @ k.mT * scale).softmax(-1)  # (B, 64, N)
        if not self.attention:  # no competition: every position gets the average of the tokens
            weights = torch.full_like(weights, 1 / weights.shape[2])
        x = x + self.mix(weights @ v)

        # It predicts its part of the noise, or of another target, from its pixel and the tokens.
        predicted = self.output(x + self.mlp(x))  # (B, 64, 3)
        return predicted.mT.reshape(z_t.shape)  # (B, 64, 3) -> (B, 3, 8, 8)


def toy(num_factors=3, attention=True, predict="noise", steps=700, num_codes=6):
    """Train encoder, token map and denoiser together, and print how the codes come apart.

    num_factors  3, or 4: the block also has a place
    attention    False: every position gets the average of the tokens
    predict      "noise", as the paper; "velocity", which counts strong noise more; or "picture",
                 from the tokens alone, without diffusion
    steps        training steps of 64 pictures
    num_codes    how many scalars the encoder has

    Returns the encoder: pictures (B, 3, 8, 8) -> codes (B, num_codes).
    """
    encoder = nn.Sequential(
        nn.Flatten(),
        nn.Linear(192, 128),
        nn.ReLU(),
        nn.Linear(128, 128),
        nn.ReLU(),
        nn.Linear(128, num_codes),
    )
    token_map = ScalarTokens(num_codes, 16)
    denoiser = ToyDenoiser(attention)
    networks = nn.ModuleList([encoder, token_map, denoiser])
    optimizer = torch.optim.AdamW(networks.parameters(), fused=True)
    alpha_bar = alpha_bars(beta_schedule("cosine")).float()

    for step in range(steps):
        # A batch: pictures, and noise that is added to them, eq. (2).
        z0 = room(torch.randint(5, (64, num_factors)))
        eps = torch.randn_like(z0)
        t = torch.randint(1, 1001, (64,))
        abar = expand(alpha_bar[t], z0)
        z_t = abar.sqrt() * z0 + (1 - abar).sqrt() * eps
        target = eps
        if predict == "velocity":  # v of Salimans & Ho 2022
            # As eps = sqrt(1 - abar_t) z_t + sqrt(abar_t) v, this loss is eq. (3) over abar_t.
            target = abar.sqrt() * eps - (1 - abar).sqrt() * z0
        elif predict == "picture":  # nothing to see and no timestep
            z_t = torch.zeros_like(z0)
            t = torch.zeros_like(t)
            target = z0

        # The loss, eq. (3): picture -> codes (64, 6) -> tokens (64, 6, 16) -> target.
        tokens = token_map(encoder(z0))
        loss = F.mse_loss(denoiser(z_t, t, tokens), target)

        # One step downhill. The learning rate rises, stays, and falls to 0.
        rise = (step + 1) / 50
        fall = 2.5 * (1 - step / steps)
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, rise, fall)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

        # Ten times in all, show what the codes know.
        if (step + 1) % max(1, steps // 10) == 0:
            print(f"step {step + 1}/{steps}  loss {loss.item():.3f}")
            print_movements(encoder, num_factors)
    return encoder


@torch.no_grad()
def print_movements(encoder, num_factors):
    """One line for each factor, one mark for each code: how far it moves if only this factor does.

    "@" is about as far as between two random pictures; " .:+*#" are less, in steps of a sixth.
    """
    names = ("wall", "floor", "block", "place")
    before, after = torch.randint(5, (2, 500, num_factors))
    codes = encoder(room(before))  # (500, N)
    spread = codes.std(0).clamp(min=1e-6)  # a constant code has none, and does not move
    for i in range(num_factors):
        changed = before.clone()
        changed[:, i] = after[:, i]
        distance = (encoder(room(changed)) - codes).abs().mean(0)  # (N,)
        marks = ""
        for share in (distance / spread).clamp(max=1):
            marks += " .:+*#@"[int(6 * share)]
        print(f"{names[i]:>7} {marks}")


@torch.no_grad()
def bayes_rise(t, pictures=5000):
    """By how much the loss of eq. (3) must rise at timestep t if one factor is not known: (4,).

    Given all factors, z_0 and so the noise are known exactly: the loss is 0. Here one factor is
    unknown, and the loss that is left is the rise. The best denoiser that sees all of z_t, where
    ToyDenoiser sees one position, weighs the five pictures that the known factors allow by how well
    each explains z_t (Bayes), and takes their mean for z_0. No network is trained. A rise of 0 says
    that z_t shows the factor anyway, or that the noise can be read off z_t without it: then it
    needs no token at this t.
    """
    abar = alpha_bars(beta_schedule("cosine"))[t]
    factors = torch.randint(5, (pictures, 4))
    z0 = room(factors).double()
    eps = torch.randn_like(z0)
    z_t = abar.sqrt() * z0 + (1 - abar).sqrt() * eps  # Eq. (2)

    rises = []
    for unknown in range(4):
        candidates = []
        for value in range(5):
            changed = factors.clone()
            changed[:, unknown] = value
            candidates.append(room(changed).double())
        candidates = torch.stack(candidates)  # (5, pictures, 3, 8, 8)

        # z_t is N(sqrt(abar) z_0, (1 - abar) I), so Bayes' weights are a softmax of distances.
        distances = (z_t - abar.sqrt() * candidates).square().sum((2, 3, 4))  # (5, pictures)
        weights = (-distances / (2 * (1 - abar))).softmax(0)
        mean = (weights[:, :, None, None, None] * candidates).sum(0)  # the best guess of z_0
        predicted = (z_t - abar.sqrt() * mean) / (1 - abar).sqrt()  # Eq. (2) solved for eps
        rises.append(F.mse_loss(predicted, eps))
    return torch.stack(rises)


def print_bayes():
    """The table of `bayes_rise`: what a token is needed for, at each timestep."""
    print("rise of the loss, eq. (3), if one factor is not known: the best denoiser possible")
    print("     t      wall     floor     block     place")
    for t in (100, 200, 300, 400, 500, 600, 700, 800, 900, 950, 990):
        rises = bayes_rise(t).tolist()
        print(f"{t:6d}  " + "  ".join(f"{rise:8.4f}" for rise in rises))


def print_scores(encoder, num_factors):
    """DCI of the encoder's codes, if metrics.py lies beside this file."""
    try:
        from metrics import dci  # only here: all else needs torch alone
    except ImportError:
        print("metrics.py is not beside this file: no scores")
        return
    labels = torch.randint(5, (4000, num_factors))
    codes = encoder(room(labels)).detach()
    scores = dci(codes[:3000], labels[:3000], codes[3000:], labels[3000:])
    print(f"disentanglement {scores['disentanglement']:.3f}  completeness "
          f"{scores['completeness']:.3f}  informativeness {scores['informativeness_test']:.3f}")


def main(arguments=None):
    """The toy's command line."""
    parser = argparse.ArgumentParser(description="the whole method on 8x8 pictures",
                                     usage=argparse.SUPPRESS)  # so that an error is one line
    parser.add_argument("--seed", type=int, default=0,
                        help="fixes everything random (default: 0)")
    parser.add_argument("--no-attention", action="store_true",
                        help="every position gets the average of the tokens")
    parser.add_argument("--moving", action="store_true",
                        help="the block's place is a fourth factor; 1,500 steps, not 700")
    parser.add_argument("--predict", choices=("noise", "velocity", "picture"), default="noise",
                        help="velocity: strong noise counts more; picture: without diffusion")
    parser.add_argument("--bayes", action="store_true",
                        help="train nothing; print what a token is needed for at each timestep")
    if arguments is not None:  # a call from Python may bring numbers
        arguments = [str(word) for word in arguments]
    args = parser.parse_args(arguments)

    torch.manual_seed(args.seed % 2**64)  # torch takes no larger ones
    if args.bayes:
        print_bayes()
        return
    num_factors = 4 if args.moving else 3
    steps = 1500 if args.moving else 700
    encoder = toy(num_factors, not args.no_attention, args.predict, steps)
    print_scores(encoder, num_factors)


# ---- Another sampler and encoder, eq. (5), variants. Skip on first reading. ----------------------


def dpm_solver(estimate, alpha_bar, z, steps):
    """DPM-Solver++(2M) (Lu et al. 2022b), Algorithm 2: second order from two estimates of z_0.

    Let signal_t = sqrt(abar_t), noise_t = sqrt(1 - abar_t), lambda_t = log(signal_t / noise_t). If
    D, the estimate of z_0, were constant from t to s, then with h = lambda_s - lambda_t

        z_s = (noise_s / noise_t) z_t - signal_s (e^-h - 1) D.

    The second order takes for D the value in the middle of the step, at lambda_t + h / 2, to which
    the last two estimates are extended linearly in lambda. Arguments as for the samplers above.
    """
    ts = timesteps_down(len(alpha_bar) - 1, steps)
    lambdas = 0.5 * (alpha_bar.log() - (1 - alpha_bar).log())  # (T + 1,); infinite at t = 0
    previous_z0 = None
    previous_h = None
    for t, s in zip(ts[:-2], ts[1:-1]):  # from t to the smaller s
        z0 = estimate(z, t)
        h = lambdas[s] - lambdas[t]
        if previous_z0 is None:
            D = z0
        else:
            r = previous_h / h
            D = (1 + 1 / (2 * r)) * z0 - 1 / (2 * r) * previous_z0

        shrink = ((1 - alpha_bar[s]) / (1 - alpha_bar[t])).sqrt()  # noise_s / noise_t
        z = shrink * z - alpha_bar[s].sqrt() * torch.expm1(-h) * D
        previous_z0 = z0
        previous_h = h
    return estimate(z, ts[-2])  # without noise, z_0 is the estimate itself


SAMPLERS = {"ddpm": ddpm, "ddim": ddim, "dpm": dpm_solver}


def kl_bottleneck(betas, second_moment=1.0):
    """Eq. (5), C_t / n: KL(q(z_{t-1} | z_t, z_0) || N(0, I)), for each number of a latent, in nats.

    betas float64 (T,), second_moment E[z_0^2] of one number -> float64 (T,), entry t - 1 for t.
    Only `python sample.py kl` needs it, to draw the paper's Figure 2(b).
    mu~_t and beta~_t are the mean and the variance of eq. (4).

    The paper calls this a bottleneck: the smaller t is, the more a step may pass on. No loss
    contains it. It includes information that z_t shows already, without any token.

    Eq. (5): C_t / n = 1/2 [beta~_t - 1 - log beta~_t + E|mu~_t|^2 / n]. (The paper prints -beta~_t
    in the place of the first beta~_t; the KL of two Gaussians has a plus.) With z_t from eq. (2),
    and as a + b sqrt(abar_t) = sqrt(abar_{t-1}), the mean mu~_t = a z_0 + b z_t of eq. (4) is
    sqrt(abar_{t-1}) z_0 + b sqrt(1 - abar_t) eps. So the expectation has a closed form.
    beta~_1 = 0 is clipped at 1e-20.
    """
    alpha_bar = alpha_bars(betas)
    t = torch.arange(1, len(betas) + 1)
    _, b, v = posterior(alpha_bar, t)
    mean_square = alpha_bar[t - 1] * second_moment + b**2 * (1 - alpha_bar[t])  # E|mu~_t|^2 / n
    v = v.clamp(min=1e-20)
    return 0.5 * (v - 1 - v.log() + mean_square)


class CNNBatchNormEncoder(nn.Module):
    """The encoder of the authors' code (there of width 128): images -> codes (B, outputs).

    patch: one convolution of 8x8 pixels in place of the first two, which cost the most.
    """

    def __init__(self, outputs, size=64, width=64, patch=False):
        super().__init__()
        halve = dict(kernel_size=4, stride=2, padding=1)
        quarter = dict(kernel_size=8, stride=4, padding=2)
        windows = [quarter, halve, halve] if patch else [halve, halve, halve, halve]

        layers = []
        c_in = 3
        for window in windows:
            layers.append(nn.Conv2d(c_in, width, **window))
            layers.append(nn.BatchNorm2d(width))
            layers.append(nn.ReLU(inplace=True))
            c_in = width
        self.down = nn.Sequential(*layers)

        self.residual = nn.ModuleList()
        for _ in range(2):
            block = nn.Sequential(
                nn.ReLU(),
                nn.Conv2d(width, width, 3, padding=1),
                nn.BatchNorm2d(width),
                nn.ReLU(),
                nn.Conv2d(width, width, 1),
                nn.BatchNorm2d(width),
            )
            self.residual.append(block)
        self.out = nn.Linear(width * (size // 16) ** 2, outputs)

    def forward(self, images):
        x = self.down(images)  # (B, 3, size, size) -> (B, width, size/16, size/16)
        for block in self.residual:
            x = x + block(x)
        return self.out(F.relu(x).flatten(1))  # (B, width, size/16, size/16) -> (B, outputs)

    def adamw_layers(self):
        """The last layer, which train.py's optimizer Muon leaves to AdamW."""
        return [self.out]


class EncDec(EncDiff):
    """EncDec w/o Diff (Table 3): a unet.DirectDecoder draws z_0 from the tokens at once."""

    def loss(self, images, t=None, noise=None):
        """The mean squared error of z_0; t and noise are not used."""
        latents = self.latents(images)
        z0 = self.denoiser(self.tokens(self.represent(images)))
        return F.mse_loss(z0.to(latents.dtype), latents)

    @torch.no_grad()
    def sample(self, tokens, steps=1, sampler="none", noise=None, eta=0.0):
        """tokens (B, N, d) -> images (B, 3, size, size) in [-1, 1], in one pass."""
        return self.decode(self.denoiser(tokens).to(self.alpha_bar.dtype))


class VectorEncoder(nn.Module):
    """EncDiff-V (Table 5): an encoder of N*d outputs -> codes (B, N, d), which are the tokens."""

    def __init__(self, encoder, num_tokens, token_dim):
        super().__init__()
        self.encoder = encoder
        self.shape = (num_tokens, token_dim)

    def forward(self, images):
        return self.encoder(images).unflatten(1, self.shape)  # (B, N*d) -> (B, N, d)

    def adamw_layers(self):
        return self.encoder.adamw_layers()


def check_codes(codes, N):
    """ValueError unless the codes have the shape (B, N)."""
    if codes.shape[1:] != (N,):
        raise ValueError(f"codes have shape {tuple(codes.shape)}; expected (B, {N})")


class EulerTokens(ScalarTokens):
    """Table 11, after Cha & Thiyagalingam 2023: scalar a becomes an angle, (cos theta, sin theta).

    theta = gamma 2 pi (a - low) / (high - low) + beta. low and high are moving averages of the
    batches' minimum and maximum; gamma (from 0.01) and beta (from pi) are learned.
    """

    def __init__(self, num_tokens, token_dim):
        super().__init__(num_tokens, token_dim, width_in=2)
        self.gamma = nn.Parameter(torch.full((num_tokens,), 0.01))
        self.beta = nn.Parameter(torch.full((num_tokens,), math.pi))
        self.register_buffer("low", torch.full((num_tokens,), -1.0))
        self.register_buffer("high", torch.full((num_tokens,), 1.0))

    def forward(self, codes):
        check_codes(codes, len(self.low))
        if self.training:  # afterwards an angle must not depend on the rest of its batch
            self.low.lerp_(codes.detach().to(self.low).amin(0), 0.01)
            self.high.lerp_(codes.detach().to(self.high).amax(0), 0.01)

        extent = (self.high - self.low).clamp(min=1e-4)
        theta = self.gamma * 2 * math.pi * (codes - self.low) / extent + self.beta  # (B, N)
        circle = torch.stack([theta.cos(), theta.sin()], dim=-1)  # (B, N) -> (B, N, 2)
        return super().forward(circle)


class SparseEncDiff(EncDiff):
    """Table 11, after Fumero et al. 2023: few codes are active at once.

    The penalty is the entropy of |a_i| / sum |a_j|, divided by its maximum, log N. An L1 norm could
    be evaded: shrunken codes, stretched again by the token map. Ten times the weight made all codes
    collapse.
    """

    WEIGHT = 0.001

    def represent(self, images):
        """images -> codes (B, N), which `loss` looks at."""
        self.codes = super().represent(images)
        return self.codes

    def loss(self, images, t=None, noise=None):
        """Eq. (3) and the penalty."""
        error = super().loss(images, t, noise)
        codes = self.codes
        self.codes = None
        share = F.normalize(codes.float().abs() + 1e-6, p=1, dim=1)  # (B, N), sums of 1
        entropy = -(share * share.log()).sum(1).mean()
        most = math.log(max(2, share.shape[1]))
        return error + self.WEIGHT * entropy / most


class OrthogonalTokens(nn.Module):
    """Table 11, after Yang et al. 2023c: token i is scalar i times row i of an orthogonal matrix.

    The matrix is exp(A - A^T). Codes (B, N) -> tokens (B, N, d), N <= d, else ValueError.
    """

    def __init__(self, num_tokens, token_dim):
        super().__init__()
        if num_tokens > token_dim:
            raise ValueError(f"{num_tokens} tokens of width {token_dim}; expected at most "
                             f"{token_dim} tokens, as more cannot be orthogonal")
        self.num_tokens = num_tokens
        self.A = nn.Parameter(0.1 * torch.randn(token_dim, token_dim))

    def forward(self, codes):
        check_codes(codes, self.num_tokens)
        with torch.autocast(codes.device.type, enabled=False):
            rotation = torch.linalg.matrix_exp(self.A - self.A.t())  # (d, d)
        return codes[:, :, None] * rotation[:self.num_tokens]  # (B, N, 1) * (N, d) -> (B, N, d)


class QueryLayer(nn.Module):
    """Each query asks the image's features: (queries (B, N, c), features (B, P, c)) -> (B, N, c).

    There is no attention among the queries: what one token knows, another must not copy.
    """

    def __init__(self, channels, heads=4):
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attention = nn.MultiheadAttention(channels, heads, batch_first=True)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = nn.Sequential(
            nn.Linear(channels, 4 * channels),
            nn.GELU(),
            nn.Linear(4 * channels, channels),
        )

    def forward(self, queries, features):
        asked, _ = self.attention(self.norm1(queries), features, features, need_weights=False)
        queries = queries + asked
        return queries + self.mlp(self.norm2(queries))


class TransformerEncoder(nn.Module):
    """EncDiff w/ Trans (Table 12): images (B, 3, size, size) -> codes (B, outputs).

    As in Visual Concepts Tokenization (Yang et al. 2022b): the features of the image attend to each
    other, N learned queries attend to the features, and the queries do not attend to each other.
    Codes must not all be alike at first. So each query has a readout of its own, and features are
    normed and positions and queries large: else every query begins with the same average of them.
    queries: N, which divides outputs, else ValueError; by default each output has its own.
    """

    def __init__(self, outputs, size=64, width=64, queries=None, layers=2):
        super().__init__()
        queries = queries or outputs
        if outputs % queries:
            raise ValueError(f"{outputs} outputs of {queries} queries; expected a multiple")
        c = 4 * width

        self.cnn = nn.Sequential(  # each convolution halves the resolution
            nn.Conv2d(3, width, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(2 * width, c, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(c, c, 4, stride=2, padding=1),
        )
        self.norm_in = nn.LayerNorm(c)
        self.positions = nn.Parameter(torch.randn((size // 16) ** 2, c))
        self.queries = nn.Parameter(torch.randn(queries, c))

        self.feature_layers = nn.ModuleList()
        self.query_layers = nn.ModuleList()
        for _ in range(layers):
            self.feature_layers.append(nn.TransformerEncoderLayer(
                c, 4, 4 * c, dropout=0.0, activation="gelu", batch_first=True, norm_first=True))
            self.query_layers.append(QueryLayer(c))
        self.norm = nn.LayerNorm(c)
        self.readouts = nn.Parameter(c**-0.5 * torch.randn(queries, c, outputs // queries))

    def forward(self, images):
        features = self.cnn(images).flatten(2).transpose(1, 2)  # (B, c, h, w) -> (B, P, c)
        features = self.norm_in(features) + self.positions
        x = self.queries.expand(len(images), -1, -1)  # (N, c) -> (B, N, c)
        for feature_layer, query_layer in zip(self.feature_layers, self.query_layers):
            features = feature_layer(features)
            x = query_layer(x, features)
        x = self.norm(x).transpose(0, 1)  # (B, N, c) -> (N, B, c)
        codes = x @ self.readouts  # (N, B, c) @ (N, c, m) -> (N, B, m)
        return codes.transpose(0, 1).flatten(1)  # (N, B, m) -> (B, N m), which are the outputs

    def adamw_layers(self):
        """For train.py: none, as its optimizer Muon trains no readouts in any case."""
        return []


class NoiseFromVelocity(nn.Module):
    """The denoiser of pixel space: (z_t, t, tokens) -> noise.

    The network inside predicts v = sqrt(abar_t) eps - sqrt(1 - abar_t) z_0 (Salimans & Ho 2022).
    Strong noise in 192 channels does not fit through a narrower network, so z_t is added behind it.
    The loss remains eq. (3). alpha_bar: EncDiff's, (T + 1,).
    """

    def __init__(self, network, alpha_bar):
        super().__init__()
        self.network = network
        self.register_buffer("alpha_bar", alpha_bar, persistent=False)  # EncDiff saves it

    def forward(self, z_t, t, tokens):
        abar = expand(self.alpha_bar[t], z_t)
        velocity = self.network(z_t, t, tokens).to(z_t.dtype)
        return abar.sqrt() * velocity + (1 - abar).sqrt() * z_t

    def adamw_layers(self):
        return self.network.adamw_layers()


ENCODERS = {
    "cnn": CNNEncoder,
    "cnn_bn": CNNBatchNormEncoder,
    "cnn_patch": functools.partial(CNNBatchNormEncoder, patch=True),
    "transformer": TransformerEncoder,
}


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(130) from None  # without a traceback
