"""EncDiff: an image becomes N scalars, the scalars tokens, and a diffusion model draws from them.

WHERE     Read first; then unet.py (the denoiser) and vq.py (the latent space). Imports torch alone:
          encoder, first stage and denoiser are handed to EncDiff, so this file can be copied.
PAPER     arXiv 2402.09712, Sec. 3 and Appendices B-D. Equation numbers are the paper's.
SHAPES    B batch, N tokens, d token width, (C, h, w) latent, n = C*h*w, T timesteps.
SYMBOLS   z_0        z0                (B, C, h, w)  latent of the image, divided by its std
          z_t        z_t               (B, C, h, w)  z_0 with noise, t = 1..T
          eps        noise             (B, C, h, w)  the noise in z_t, N(0, I)
          beta_t     betas[t - 1]      (T,)          variance added in step t
          abar_t     alpha_bar[t]      (T + 1,)      share of signal variance left; alpha_bar[0] = 1
          S          tokens            (B, N, d)     concept tokens; in sizes, S is an image's side
          C_t / n    kl_bottleneck     (T,)          nats that step t lets through, by eq. (5)
IDEA      Encoder and denoiser learn together to predict noise, eq. (3); nothing in that loss asks
          for disentanglement. What separates the factors is the denoiser's only view of the image:
          in cross-attention each position chooses among the tokens, so a token gains by meaning one
          thing; and each token is a function of ONE scalar, so it has no second dimension in which
          to hide a second factor. The paper's second argument is the noise: a bottleneck, eq. (5),
          that opens as t falls, as AnnealVAE's opens over training. (C_t does not tell what the
          tokens are needed for, though, as it counts what z_t shows anyway.) A token pays at
          timestep t if the loss there is higher without it: a place pays under strong noise alone,
          as weak noise leaves it visible. So the noise that training meets decides which factors
          get a token (python sample.py worth; toy --noise strong-first).
DIFFERS   Eq. (3) is printed without the square; Table 7 says MSE, and so do we. Eq. (5) is printed
          with -beta~_t where the KL of two Gaussians has +beta~_t; we compute the KL.
TRY       python encdiff.py   ->   the whole method on 8x8 pictures while you watch, in a minute
          DCI disentanglement on seeds 11 to 20, median and range (informativeness, median):
            three factors                            1.000   .979 to 1.000  (1.000)
            three factors, --no-noise                1.000   .982 to 1.000  (1.000)
            three factors, --no-attention             .783   .659 to  .936  (1.000)
            and the block's place, strong-first      1.000  1.000 in all    (1.000)
            and the block's place, uniform            .615   .442 to  .660   (.970)
            and the block's place, none               .663   .464 to  .852  (1.000)
          Competition alone separates what stays in its place. What moves takes noise, strong first.
"""
import argparse
import functools
import math

import torch
import torch.nn as nn
import torch.nn.functional as F


# ---- The encoder: image -> N scalars -> N concept tokens ----------------------------------------


class CNNEncoder(nn.Module):
    """The paper's encoder (Table 6): images (B, 3, S, S) in [-1, 1] -> codes (B, outputs)."""

    def __init__(self, outputs, size=64, width=64):
        super().__init__()
        widths = [width, 2 * width, 4 * width, 4 * width, 4 * width]
        layers = [nn.Conv2d(3, width, 7, padding=3), nn.ReLU(inplace=True)]
        for c_in, c_out in zip(widths, widths[1:]):  # each halves the resolution
            layers += [nn.Conv2d(c_in, c_out, 4, stride=2, padding=1), nn.ReLU(inplace=True)]
        features = 4 * width * (size // 16) ** 2  # 4096 at the paper's size
        layers += [nn.Flatten(), nn.Linear(features, 256), nn.ReLU(inplace=True),
                   nn.Linear(256, 256), nn.ReLU(inplace=True), nn.Linear(256, outputs)]
        self.layers = nn.Sequential(*layers)

    def forward(self, images):
        return self.layers(images)


class CNNBatchNormEncoder(nn.Module):
    """The encoder of the authors' code: images (B, 3, S, S) in [-1, 1] -> codes (B, outputs). Our
    preset `small` has it with `patch`: the first two, costly convolutions become one of 8x8."""

    def __init__(self, outputs, size=64, width=128, patch=False):
        super().__init__()
        layers, c = [], 3
        first = [(8, 4, 2)] if patch else 2 * [(4, 2, 1)]  # kernel, stride, padding
        for window in first + 2 * [(4, 2, 1)]:
            layers += [nn.Conv2d(c, width, *window), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            c = width
        self.down = nn.Sequential(*layers)
        self.residual = nn.ModuleList(
            nn.Sequential(nn.ReLU(), nn.Conv2d(c, c, 3, padding=1), nn.BatchNorm2d(c),
                          nn.ReLU(), nn.Conv2d(c, c, 1), nn.BatchNorm2d(c)) for _ in range(2))
        self.out = nn.Linear(c * (size // 16) ** 2, outputs)

    def forward(self, images):
        x = self.down(images)
        for block in self.residual:
            x = x + block(x)
        return self.out(F.relu(x).flatten(1))  # (B, c, S/16, S/16) -> (B, outputs)


class ScalarTokens(nn.Module):
    """N MLPs 1 -> 64 -> 128 -> d with ELU: codes (B, N) -> tokens (B, N, d). They share no weight:
    attention does not see the order of the tokens, so only its MLP makes a token differ by kind."""

    def __init__(self, num_tokens, token_dim, width_in=1):
        super().__init__()
        widths = (width_in, 64, 128, token_dim)
        # One tensor holds a layer of all N MLPs: one batched product in place of N small ones.
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for c_in, c_out in zip(widths, widths[1:]):
            limit = c_in**-0.5  # as nn.Linear initialises
            weight, bias = torch.empty(num_tokens, c_in, c_out), torch.empty(num_tokens, 1, c_out)
            self.weights.append(nn.Parameter(weight.uniform_(-limit, limit)))
            self.biases.append(nn.Parameter(bias.uniform_(-limit, limit)))

    def forward(self, codes):
        x = codes.reshape(*codes.shape[:2], -1).transpose(0, 1)  # (B, N) -> (B, N, 1) -> (N, B, 1)
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases)):
            x = torch.baddbmm(bias, F.elu(x) if i else x, weight)  # (N, B, c_in) -> (N, B, c_out)
        return x.transpose(0, 1)  # (N, B, d) -> (B, N, d)


# ---- The noise schedules, eq. (1) ---------------------------------------------------------------

SCHEDULES = ("cosine", "linear", "sqrt_linear", "sqrt")


def beta_schedule(name, steps=1000, start=0.0015, end=0.0155):
    """beta_1..beta_T of Eq. (1): q(z_t | z_{t-1}) = N(sqrt(1 - beta_t) z_{t-1}, beta_t I).

    name: one of SCHEDULES, else ValueError -> float64 tensor (steps,). The names are the latent
    diffusion code's, and odd: "linear" is linear in sqrt(beta), "sqrt_linear" the straight line.
    """
    if name == "cosine":  # Nichol & Dhariwal 2021: abar_t falls as a squared cosine
        t = torch.arange(steps + 1, dtype=torch.float64) / steps
        f = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
        return (1 - f[1:] / f[:-1]).clamp(max=0.999)  # the last one would be 1: no signal at all
    line = lambda a, b: torch.linspace(a, b, steps, dtype=torch.float64)
    lines = {"linear": line(start**0.5, end**0.5) ** 2, "sqrt_linear": line(start, end),
             "sqrt": line(start, end).sqrt()}
    if name not in lines:
        raise ValueError(f"schedule is {name!r}; expected one of {', '.join(SCHEDULES)}")
    return lines[name]


def cumulative(betas):
    """betas (T,) -> alpha_bar (T + 1,) with alpha_bar[0] = 1, so that alpha_bar[t] is abar_t."""
    return torch.cat([betas.new_ones(1), (1 - betas).cumprod(0)])


# ---- The model, eq. (2)-(3) ---------------------------------------------------------------------


class EncDiff(nn.Module):
    """Encoder, token maps and denoiser, in the latent space of a frozen first stage.

    first_stage  encode(images) -> latent, decode(latent) -> images (vq.VQAutoencoder); frozen here
    encoder      images (B, 3, S, S) -> codes (B, N); token_map: codes -> tokens (B, N, d)
    denoiser     (z_t, t, tokens) -> noise (unet.UNet)
    latent_shape (C, h, w); schedule: name for beta_schedule; timesteps: T
    """

    def __init__(self, first_stage, encoder, token_map, denoiser, latent_shape=(3, 16, 16),
                 schedule="cosine", timesteps=1000):
        super().__init__()
        self.first_stage = first_stage.requires_grad_(False).eval()
        self.encoder, self.token_map, self.denoiser = encoder, token_map, denoiser
        self.latent_shape = latent_shape
        self.register_buffer("alpha_bar", cumulative(beta_schedule(schedule, timesteps)).float())
        self.register_buffer("latent_std", torch.ones(()))
        self.register_buffer("largest_rms", torch.tensor(math.inf))  # see `sample`

    def train(self, mode=True):
        super().train(mode)
        self.first_stage.eval()  # frozen: also where a train mode would behave differently
        return self

    @torch.no_grad()
    def measure_latents(self, images):
        """Before training: these latents' std becomes the unit; `sample` needs the largest rms."""
        z = torch.cat([self.first_stage.encode(some).float() for some in images.split(64)])
        self.latent_std.copy_(z.std())
        self.largest_rms.copy_(z.square().mean((1, 2, 3)).max().sqrt() / z.std())

    @torch.no_grad()
    def latents(self, images):
        """images (B, 3, S, S) in [-1, 1] -> z_0 (B, C, h, w), unquantised, divided by its std."""
        return self.first_stage.encode(images).float() / self.latent_std

    def represent(self, images):
        """images (B, 3, S, S) in [-1, 1] -> codes (B, N), or (B, N, d) for vector-valued tokens."""
        return self.encoder(images)

    def tokens(self, codes):
        """codes as from `represent` -> concept tokens (B, N, d)."""
        return self.token_map(codes)

    def add_noise(self, z0, t, noise):
        """Eq. (2): z_t = sqrt(abar_t) z_0 + sqrt(1 - abar_t) eps; t (B,) int64 in 1..T."""
        abar = self.alpha_bar[t][:, None, None, None]  # (B,) -> (B, 1, 1, 1)
        return abar.sqrt() * z0 + (1 - abar).sqrt() * noise

    def loss(self, images, t=None, noise=None):
        """Eq. (3), E |eps - eps_theta(z_t, t, S)|^2, as a mean over batch and dimensions: a scalar.

        images (B, 3, S, S) in [-1, 1]; t (B,) and noise (B, C, h, w) are drawn unless given.
        """
        z0 = self.latents(images)
        if t is None:
            t = torch.randint(1, len(self.alpha_bar), (len(z0),), device=z0.device)  # t ~ U{1..T}
        noise = torch.randn_like(z0) if noise is None else noise
        codes = self.represent(images)  # (B, N): the only way from the image to the denoiser
        z_t = self.add_noise(z0, t, noise)  # Eq. (2)
        return F.mse_loss(self.denoiser(z_t, t, self.tokens(codes)).float(), noise)  # Eq. (3)

    def forward(self, *args):
        return self.loss(*args)  # under the name that DistributedDataParallel calls

    @torch.no_grad()
    def sample(self, tokens, steps=20, sampler="dpm", noise=None, **options):
        """tokens (B, N, d) -> images (B, 3, S, S) in [-1, 1]; noise (B, C, h, w) is z_T.
        sampler: ddpm (always T steps), ddim (option eta: 0 to 1) or dpm."""
        def predict(z_t, t):
            times = torch.full((len(z_t),), t, device=z_t.device)
            eps = self.denoiser(z_t, times, tokens).float()
            abar = self.alpha_bar[t]
            z0 = (z_t - (1 - abar).sqrt() * eps) / abar.sqrt()  # Eq. (2) solved for z_0
            # Near t = T we divide by almost nothing, for cosine by 1/20,291: an error of 0.01 in
            # the noise becomes 200 in z_0. So the estimate is scaled back to the largest root mean
            # square of a real latent. (Clamping each number would leave noise at full size.)
            rms = z0.square().mean((1, 2, 3), keepdim=True).sqrt()
            return z0 * (self.largest_rms / rms).clamp(max=1)

        if noise is None:
            noise = torch.randn(len(tokens), *self.latent_shape, device=tokens.device)
        return self.decode(SAMPLERS[sampler](predict, self.alpha_bar, noise, steps, **options))

    @torch.no_grad()
    def decode(self, z0):
        """z_0 in units of its std (B, C, h, w) -> images (B, 3, S, S) in [-1, 1]."""
        return self.first_stage.decode(z0 * self.latent_std).float().clamp(-1, 1)


# ---- Samplers, each a short function, and the bottleneck that noise is, eq. (4)-(5) -------------
# predict(z_t, t) estimates z_0 from z_t (B, C, h, w) at timestep t, an int. All start at z_T = z
# (B, C, h, w), include t = T, add no noise in their last step, and return z_0 (B, C, h, w).


def timesteps_down(T, steps):
    """`steps` (1 to T, else ValueError) even timesteps from T down, then 0: a list of integers."""
    if not 1 <= steps <= T:
        raise ValueError(f"steps is {steps}; expected 1 to {T}, the timesteps of the schedule")
    return [round(T * (1 - i / steps)) for i in range(steps + 1)]


def posterior(alpha_bar, t):
    """Eq. (4): q(z_{t-1} | z_t, z_0) = N(a z_0 + b z_t, v I) -> coefficients a, b and variance v.

    alpha_bar (T + 1,), t int or int64 tensor in 1..T; a, b, v of t's shape. v is 0 at t = 1.
    """
    now, before = alpha_bar[t], alpha_bar[t - 1]
    alpha = now / before  # alpha_t = 1 - beta_t
    a = before.sqrt() * (1 - alpha) / (1 - now)  # sqrt(abar_{t-1}) beta_t / (1 - abar_t)
    b = alpha.sqrt() * (1 - before) / (1 - now)  # sqrt(alpha_t) (1 - abar_{t-1}) / (1 - abar_t)
    v = (1 - before) / (1 - now) * (1 - alpha)  # beta~_t
    return a, b, v


def ddpm(predict, alpha_bar, z, steps=None):
    """Ancestral sampling, DDPM (Ho et al. 2020) Algorithm 2: every one of the T steps."""
    for t in range(len(alpha_bar) - 1, 0, -1):
        a, b, v = posterior(alpha_bar, t)  # Eq. (4) with the estimate in the place of z_0
        z = a * predict(z, t) + b * z + (v.sqrt() * torch.randn_like(z) if t > 1 else 0)
    return z


def ddim(predict, alpha_bar, z, steps, eta=0.0):
    """DDIM (Song et al. 2021), its eq. 12 and 16: eta 0 is deterministic, 1 has DDPM's variance."""
    ts = timesteps_down(len(alpha_bar) - 1, steps)
    for t, s in zip(ts, ts[1:]):  # from t to the smaller s
        now, then = alpha_bar[t], alpha_bar[s]
        z0 = predict(z, t)
        eps = (z - now.sqrt() * z0) / (1 - now).sqrt()  # Eq. (2) solved for eps
        sigma = eta * ((1 - then) / (1 - now) * (1 - now / then)).sqrt()
        z = then.sqrt() * z0 + (1 - then - sigma**2).clamp(min=0).sqrt() * eps
        if s > 0:
            z = z + sigma * torch.randn_like(z)
    return z


def dpm_solver(predict, alpha_bar, z, steps):
    """DPM-Solver++(2M) (Lu et al. 2022b), Algorithm 2: second order from two estimates of z_0.

    Let alpha = sqrt(abar), sigma = sqrt(1 - abar), lambda = log(alpha / sigma), h = lambda_s -
    lambda_t. If D, the estimate of z_0, were constant from t to s, then z_s = sigma_s / sigma_t z_t
    - alpha_s (e^-h - 1) D. The second order extrapolates D linearly in lambda from the last two.
    """
    ts = timesteps_down(len(alpha_bar) - 1, steps)
    lambdas = 0.5 * (alpha_bar.log() - (1 - alpha_bar).log())  # (T + 1,); infinite at t = 0
    for i, (t, s) in enumerate(zip(ts, ts[1:])):
        z0 = predict(z, t)
        if s == 0:
            return z0  # as sigma_s is 0
        h = lambdas[s] - lambdas[t]
        D = z0
        if i > 0:
            r = (lambdas[t] - lambdas[ts[i - 1]]) / h
            D = (1 + 1 / (2 * r)) * z0 - 1 / (2 * r) * previous
        shrink = ((1 - alpha_bar[s]) / (1 - alpha_bar[t])).sqrt()  # sigma_s / sigma_t
        z = shrink * z - alpha_bar[s].sqrt() * torch.expm1(-h) * D
        previous = z0


SAMPLERS = {"ddpm": ddpm, "ddim": ddim, "dpm": dpm_solver}


def kl_bottleneck(betas, second_moment=1.0):
    """Eq. (5) for each latent dimension: KL(q(z_{t-1} | z_t, z_0) || N(0, I)) / n, in nats.

    betas float64 (T,), second_moment E[z_0^2] of one dimension -> float64 (T,), entry t - 1 for t.
    No loss contains it. Eq. (5): C_t / n = 1/2 [beta~_t - 1 - log beta~_t + E|mu~_t|^2 / n]. With
    z_t from eq. (2), mu~_t = a z_0 + b z_t is sqrt(abar_{t-1}) z_0 + b sqrt(1 - abar_t) eps, so the
    expectation has a closed form. beta~_1 = 0 is clipped at 1e-20.
    """
    alpha_bar = cumulative(betas)
    t = torch.arange(1, len(betas) + 1)
    _, b, v = posterior(alpha_bar, t)
    mean_square = alpha_bar[t - 1] * second_moment + b**2 * (1 - alpha_bar[t])  # E|mu~_t|^2 / n
    v = v.clamp(min=1e-20)
    return 0.5 * (v - 1 - v.log() + mean_square)


# ---- Variants (Tables 1, 3, 5, 11, 12). Skip on first reading. ----------------------------------


class EncDec(EncDiff):
    """EncDec w/o Diff (Table 3): a unet.DirectDecoder draws z_0 from the tokens at once."""

    def loss(self, images, t=None, noise=None):
        z0 = self.denoiser(self.tokens(self.represent(images))).float()
        return F.mse_loss(z0, self.latents(images))

    @torch.no_grad()
    def sample(self, tokens, steps=1, sampler="none", noise=None):
        return self.decode(self.denoiser(tokens).float())


def vector_valued(encoder, num_tokens, token_dim):
    """EncDiff-V (Table 5): an encoder of N*d outputs -> encoder of codes (B, N, d), token map."""
    return nn.Sequential(encoder, nn.Unflatten(1, (num_tokens, token_dim))), nn.Identity()


class EulerTokens(ScalarTokens):
    """Table 11, after Cha & Thiyagalingam 2023: scalar a becomes an angle, (cos theta, sin theta).
    theta = gamma 2 pi (a - low) / (high - low) + beta. low and high are moving averages of the
    batches' minimum and maximum; gamma (from 0.01) and beta (from pi) are learned."""

    def __init__(self, num_tokens, token_dim):
        super().__init__(num_tokens, token_dim, width_in=2)
        self.gamma = nn.Parameter(torch.full((num_tokens,), 0.01))
        self.beta = nn.Parameter(torch.full((num_tokens,), math.pi))
        self.register_buffer("low", torch.full((num_tokens,), -1.0))
        self.register_buffer("high", torch.full((num_tokens,), 1.0))

    def forward(self, codes):
        if self.training:
            self.low.lerp_(codes.detach().float().amin(0), 0.01)
            self.high.lerp_(codes.detach().float().amax(0), 0.01)
        share = (codes - self.low) / (self.high - self.low).clamp(min=1e-4)
        theta = self.gamma * 2 * math.pi * share + self.beta  # (B, N)
        return super().forward(torch.stack([theta.cos(), theta.sin()], dim=-1))  # of (B, N, 2)


class SparseEncDiff(EncDiff):
    """Table 11, after Fumero et al. 2023: few codes active at once. The penalty is the entropy of
    |a_i| / sum |a_j| over its maximum, log N. An L1 norm could be evaded: shrunken codes, stretched
    again by the token maps. Ten times the weight made all codes collapse."""

    def loss(self, images, t=None, noise=None, weight=0.001):
        codes = []  # what the encoder returns inside of `loss`
        with self.encoder.register_forward_hook(lambda module, inputs, out: codes.append(out)):
            error = super().loss(images, t, noise)
        share = F.normalize(codes[0].float().abs() + 1e-6, p=1, dim=1)
        entropy = -(share * share.log()).sum(1).mean()
        return error + weight * entropy / math.log(max(2, share.shape[1]))


class OrthogonalTokens(nn.Module):
    """Table 11, after Yang et al. 2023c: token i is scalar i times row i of an orthogonal matrix,
    exp(A - A^T). Codes (B, N) -> tokens (B, N, d), N <= d."""

    def __init__(self, num_tokens, token_dim):
        super().__init__()
        self.num_tokens = num_tokens
        self.A = nn.Parameter(0.1 * torch.randn(token_dim, token_dim))

    def forward(self, codes):
        with torch.autocast(codes.device.type, enabled=False):
            rows = torch.linalg.matrix_exp(self.A - self.A.t())[:self.num_tokens]  # (N, d)
        return codes[:, :, None] * rows  # (B, N, 1) * (N, d) -> (B, N, d)


class TransformerEncoder(nn.Module):
    """EncDiff w/ Trans (Table 12): images (B, 3, S, S) -> codes (B, outputs). As in Visual Concepts
    Tokenization (Yang et al. 2022b) N learned queries attend to each other and a CNN's features."""

    def __init__(self, outputs, size=64, width=64, queries=20, layers=2):
        super().__init__()
        c = 4 * width
        halve = lambda c_in, c_out: nn.Conv2d(c_in, c_out, 4, stride=2, padding=1)  # the resolution
        self.cnn = nn.Sequential(halve(3, width), nn.ReLU(), halve(width, 2 * width), nn.ReLU(),
                                 halve(2 * width, c), nn.ReLU(), halve(c, c))
        self.positions = nn.Parameter(0.02 * torch.randn((size // 16) ** 2, c))
        self.queries = nn.Parameter(0.02 * torch.randn(queries, c))
        self.layers = nn.ModuleList(
            nn.TransformerDecoderLayer(c, 4, 4 * c, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(layers))
        self.norm, self.out = nn.LayerNorm(c), nn.Linear(c, outputs // queries)

    def forward(self, images):
        features = self.cnn(images).flatten(2).transpose(1, 2) + self.positions  # -> (B, P, c)
        x = self.queries.expand(len(images), -1, -1)  # (N, c) -> (B, N, c)
        for layer in self.layers:
            x = layer(x, features)
        return self.out(self.norm(x)).flatten(1)  # (B, N, c) -> (B, outputs)


class NoiseFromVelocity(nn.Module):
    """The denoiser of pixel space, (z_t, t, tokens) -> noise: the network inside predicts v =
    sqrt(abar_t) eps - sqrt(1 - abar_t) z_0 (Salimans & Ho 2022). Strong noise in 192 channels does
    not fit through a narrower network, so z_t is added behind it. The loss remains eq. (3)."""

    def __init__(self, network, alpha_bar):
        super().__init__()
        self.network = network
        self.register_buffer("alpha_bar", alpha_bar, persistent=False)  # EncDiff saves it

    def forward(self, z_t, t, tokens):
        abar = self.alpha_bar[t][:, None, None, None]  # (B,) -> (B, 1, 1, 1)
        return abar.sqrt() * self.network(z_t, t, tokens).float() + (1 - abar).sqrt() * z_t


# Of beta 1 to 64, gamma 30 to 1000 and beta 1 to 15 these gave seed 0 the highest DCI.
VAE_WEIGHTS = {"beta": 32.0, "annealed": 100.0, "tc": 3.0}
CAPACITY, RISES = 25.0, 0.5  # C at the end, nats (Burgess et al. 2018); share of steps it rises in


def kl_terms(z, mean, log_var):
    """KL(q(z|x) || N(0, I)) in three parts, in nats (Chen et al. 2018): mutual information of x and
    z, total correlation of z, divergence of its single dimensions from N(0, 1).
    z from q(z|x) = N(mean, exp(log_var)), all (B, N) -> three scalars. Minibatch-weighted sampling:
    q(z) is the mean of the batch's q(z|x). Their constant factor, without gradient, is left out."""
    normal = functools.partial(torch.distributions.Normal, validate_args=False)
    each = normal(mean, (log_var / 2).exp()).log_prob(z[:, None])  # (B, 1, N) -> (B, B, N): i, j, d
    average = lambda log_q: log_q.logsumexp(1) - math.log(len(z))  # over the images j
    own, prior = each.diagonal().sum(0), normal(0.0, 1.0).log_prob(z).sum(1)  # (B,): of z_i
    joint, single = average(each.sum(2)), average(each).sum(1)  # (B,): of all dimensions, of each
    return (own - joint).mean(), (joint - single).mean(), (single - prior).mean()


class VAE(nn.Module):
    """beta-VAE, AnnealVAE or beta-TCVAE, with the methods of EncDiff and with pixels as target.

    encoder    images (B, 3, S, S) in [-1, 1] -> (B, 2N): a mean and a log variance for each code
    objective  a key of VAE_WEIGHTS; steps: of the whole training, in which AnnealVAE's C rises
    The latent is the code, (B, N), a mean. There is no timestep, first stage or sampler.
    """

    def __init__(self, encoder, num_codes, objective="beta", steps=1, size=64, width=64):
        super().__init__()
        self.encoder, self.objective, self.steps = encoder, objective, max(1, steps)
        self.latent_shape, low = (num_codes,), size // 16
        layers = [nn.Linear(num_codes, 256), nn.ReLU(), nn.Linear(256, width * low**2), nn.ReLU(),
                  nn.Unflatten(1, (width, low, low))]
        for _ in range(3):  # each doubles the resolution, as each of the encoder's halved it
            layers += [nn.ConvTranspose2d(width, width, 4, stride=2, padding=1), nn.ReLU()]
        self.decoder = nn.Sequential(*layers)
        self.decoder.add_module("conv_out", nn.ConvTranspose2d(width, 3, 4, stride=2, padding=1))
        self.tokens = nn.Identity()  # codes (B, N): the decoder reads them as they are
        self.register_buffer("step", torch.tensor(0))  # training steps done, also by a resumed run

    def represent(self, images):
        """images (B, 3, S, S) in [-1, 1] -> codes (B, N), the means of q(z|x)."""
        return self.encoder(images)[:, ::2]  # (B, 2N) -> (B, N)

    latents = represent

    def loss(self, images, t=None, noise=None):
        """-log p(x|z) of Bernoulli pixels + penalty, in nats for each number of an image: a scalar.
        images (B, 3, S, S) in [-1, 1]; noise (B, N) is drawn unless given; t is not used."""
        mean, log_var = self.encoder(images).float().unflatten(1, (-1, 2)).unbind(2)  # 2x (B, N)
        noise = torch.randn_like(mean) if noise is None else noise
        z = mean + (log_var / 2).exp() * noise
        error = F.binary_cross_entropy_with_logits(
            self.decoder(z).float(), (images + 1) / 2, reduction="sum") / len(images)
        kl = (mean**2 + log_var.exp() - 1 - log_var).sum(1).mean() / 2
        total_correlation = kl_terms(z, mean, log_var)[1]
        self.terms = {"kl": kl.item(), "total_correlation": total_correlation.item()}  # for log.csv
        self.step += self.training
        # Divided by an image's numbers, gradients have the size of eq. (3)'s.
        return (error + self.penalty(kl, total_correlation)) / images[0].numel()

    forward = loss  # as DistributedDataParallel calls it

    def penalty(self, kl, total_correlation):
        """What the objective adds to -log p(x|z), in nats an image; AnnealVAE's is that of Eq. (6),
        E log p(x|z) - gamma |KL(q(z|x) || p(z)) - C|, which it maximises."""
        C = CAPACITY * (self.step / (RISES * self.steps)).clamp(max=1)
        weight = VAE_WEIGHTS[self.objective]
        return {"beta": weight * kl, "annealed": weight * (kl - C).abs(),
                "tc": kl + (weight - 1) * total_correlation}[self.objective]

    @torch.no_grad()
    def decode(self, z):
        """codes (B, N) -> images (B, 3, S, S) in [-1, 1]."""
        return self.decoder(z).float().sigmoid() * 2 - 1

    def sample(self, tokens, steps=1, sampler="none", noise=None):
        """codes (B, N) -> images (B, 3, S, S) in [-1, 1], in one pass and without noise."""
        return self.decode(tokens)


ENCODERS = {"cnn": CNNEncoder, "cnn_bn": CNNBatchNormEncoder, "transformer": TransformerEncoder,
            "cnn_patch": functools.partial(CNNBatchNormEncoder, patch=True)}
REGULARIZERS = {"none": (EncDiff, ScalarTokens), "euler": (EncDiff, EulerTokens),
                "sparse": (SparseEncDiff, ScalarTokens), "orthogonal": (EncDiff, OrthogonalTokens)}


# ---- The whole method on one screen: python encdiff.py ------------------------------------------
# The latent is the picture itself, 8 x 8 pixels, so there is no first stage to train.


def room(factors):
    """factors (B, 3 or 4) in 0..4: brightness of wall, floor, block; its place -> (B, 3, 8, 8)."""
    wall, floor, block = (factors[:, :3] / 2 - 1).T[:, :, None, None]  # 3x (B, 1, 1) in [-1, 1]
    x = torch.empty(len(factors), 3, 8, 8)
    x[:, 0, :4], x[:, 1, :4], x[:, 2, :4] = wall, -wall, 0.5
    x[:, 0, 4:], x[:, 1, 4:], x[:, 2, 4:] = -0.5, floor, -floor
    left = F.pad(factors, (0, 1), value=2)[:, 3:4]  # of three factors, none is the place: always 2
    inside = (torch.arange(8) >= left) & (torch.arange(8) < left + 4)  # (B, 8): four columns
    x[:, :, 2:6] = torch.where(inside[:, None, None], 3 + block[:, None], x[:, :, 2:6])
    return x


class ToyDenoiser(nn.Module):
    """One layer of cross-attention and an MLP; each of the 64 positions works for itself."""

    def __init__(self, attention, c=32, d=16):
        super().__init__()
        self.attention, self.position = attention, nn.Parameter(0.6 * torch.randn(64, c))
        self.pixel, self.time, self.norm = nn.Linear(3, c), nn.Linear(32, c), nn.LayerNorm(c)
        self.q, self.k, self.v = nn.Linear(c, c), nn.Linear(d, c), nn.Linear(d, c)
        self.mix, self.noise = nn.Linear(c, c), nn.Linear(c, 3)
        self.mlp = nn.Sequential(nn.LayerNorm(c), nn.Linear(c, 64), nn.GELU(), nn.Linear(64, c))

    def forward(self, z_t, t, tokens):
        angles = t[:, None] * 1000 ** (-torch.arange(16) / 16)  # (B, 16)
        time = self.time(torch.cat([angles.cos(), angles.sin()], 1))[:, None]  # (B, 1, c)
        x = self.pixel(z_t.flatten(2).mT) + self.position + time  # (B, 3, 8, 8) -> (B, 64, c)
        q, k, v = self.q(self.norm(x)), self.k(tokens), self.v(tokens)  # (B, 64 or N, c)
        weights = (q @ k.mT * k.shape[2] ** -0.5).softmax(-1)  # (B, 64, N): the concepts compete
        if not self.attention:  # no competition: every position gets the average of the tokens
            weights = torch.full_like(weights, 1 / weights.shape[2])
        x = x + self.mix(weights @ v)
        return self.noise(x + self.mlp(x)).mT.reshape(z_t.shape)  # (B, 64, c) -> (B, 3, 8, 8)


def toy(factors=3, attention=True, noise="uniform", steps=700, codes=6):
    """Train encoder, token maps and denoiser together -> the encoder, images -> (B, codes). noise:
    how t is drawn, "uniform" or "strong-first"; "none": the tokens alone have to give z_0."""
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(192, 128), nn.ReLU(), nn.Linear(128, 128),
                            nn.ReLU(), nn.Linear(128, codes))
    token_map, denoiser = ScalarTokens(codes, 16), ToyDenoiser(attention)
    trained = nn.ModuleList([encoder, token_map, denoiser])
    optimizer = torch.optim.AdamW(trained.parameters(), fused=True)
    alpha_bar = cumulative(beta_schedule("cosine")).float()
    for step in range(steps):
        z0 = room(torch.randint(5, (64, factors)))
        eps = torch.randn_like(z0)
        draws = 4 if noise == "strong-first" and step < 0.6 * steps else 1
        t = torch.randint(1, 1001, (draws, 64)).amax(0)  # (64,); with one draw t ~ U{1..T}
        abar = alpha_bar[t][:, None, None, None]
        z_t = abar.sqrt() * z0 + (1 - abar).sqrt() * eps  # Eq. (2)
        if noise == "none":  # no noise and no timestep: draw the picture from its tokens
            z_t, t, eps = torch.zeros_like(z0), 0 * t, z0
        tokens = token_map(encoder(z0))  # picture -> scalars (64, codes) -> tokens (64, codes, 16)
        loss = F.mse_loss(denoiser(z_t, t, tokens), eps)  # Eq. (3)
        # The learning rate rises, stays, and falls to 0.
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, (step + 1) / 50, 2.5 * (1 - step / steps))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % (steps // 10) == 0:
            print(f"step {step + 1}/{steps}  loss {loss.item():.3f}")
            print(*who_moves(encoder, factors), sep="\n")
    return encoder


@torch.no_grad()
def who_moves(encoder, factors):
    """A line a factor, a character a code: how far it moves when that factor alone changes."""
    before, after = torch.randint(5, (2, 500, factors))
    codes = encoder(room(before))
    for i, name in enumerate(("wall", "floor", "block", "place")[:factors]):
        changed = torch.cat([before[:, :i], after[:, i:i + 1], before[:, i + 1:]], 1)
        moved = (encoder(room(changed)) - codes).abs().mean(0) / codes.std(0)  # (N,) about 0 to 1
        yield f"{name:>7} " + "".join(" .:+*#@"[int(6 * m)] for m in moved.clamp(max=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="the whole method on 8 x 8 pictures, in a minute")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-attention", action="store_true", help="average the tokens instead")
    parser.add_argument("--no-noise", action="store_true", help="draw z_0 from the tokens alone")
    parser.add_argument("--noise", choices=("uniform", "strong-first", "none"),
                        help="four factors, as the block moves; how their timesteps are drawn")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    factors, steps = (4, 1500) if args.noise else (3, 700)
    noise = "none" if args.no_noise else args.noise or "uniform"
    encoder = toy(factors, not args.no_attention, noise, steps)
    f = torch.randint(5, (4000, factors))
    codes = encoder(room(f)).detach()
    import metrics  # only here: the rest of this file needs torch alone
    scores = metrics.dci(codes[:3000], f[:3000], codes[3000:], f[3000:])
    print(f"disentanglement {scores['disentanglement']:.3f}  completeness "
          f"{scores['completeness']:.3f}  informativeness {scores['informativeness_test']:.3f}")
