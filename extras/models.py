"""Models that extras/compare.py puts beside LeWM: another loss, parts changed, the simulator itself."""

import math

import numpy as np
import torch
from torch import nn

import lewm
import probe

# ======== PLDM ========================================================================================
# LeWM's networks with the loss of PLDM (Sobal et al., arXiv 2502.14819): in place of SIGReg six terms, each
# with a weight to tune.

PLDM_WEIGHTS = {
    "variance": 1.0,            # VICReg over the batch, at each time step
    "covariance": 0.4,
    "time variance": 0.1,       # VICReg over time, in each window
    "time covariance": 0.01,
    "smoothness": 0.1,          # short steps from one embedding to the next
    "inverse dynamics": 0.1}    # actions can be read from two consecutive embeddings

def vicreg(z):
    """z (groups,n,D) -> the two terms of VICReg (Bardes, Ponce and LeCun, arXiv 2105.04906) over the n
    vectors of each group: how far standard deviations stay below 1, and the squared covariances."""
    z = z - z.mean(1, keepdim=True)
    with torch.autocast(z.device.type, enabled=False):                      # as in SIGReg
        covariance = z.mT @ z / (z.shape[1] - 1)                            # (groups,D,D)
    diagonal = covariance.diagonal(dim1=1, dim2=2)                          # (groups,D)
    missing = torch.relu(1 - (diagonal + 1e-4).sqrt())
    others = covariance.square().sum((1, 2)) - diagonal.square().sum(1)     # (groups,)
    return missing.mean(), others.mean() / z.shape[2]

class PLDM(lewm.LeWM):
    """LeWM with the six terms of PLDM in place of SIGReg. weights: {name of a term: its weight}."""
    def __init__(self, cfg, weights=PLDM_WEIGHTS):
        super().__init__(cfg)
        self.weights = weights
        self.inverse = nn.Sequential(
            nn.Linear(2 * cfg.embed_dim, 256), nn.GELU(),
            nn.Linear(256, cfg.action_block))

    def latent_loss(self, z, blocks):
        """z (B,T,D), blocks (B,T-1,A) -> scalar, {name of a term: scalar}."""
        _, parts = super().latent_loss(z, blocks)
        z = z.float()
        now = z[:, :-1]
        later = z[:, 1:]
        terms = {}
        terms["variance"], terms["covariance"] = vicreg(z.transpose(0, 1))  # T groups of B
        terms["time variance"], terms["time covariance"] = vicreg(z)        # B groups of T
        terms["smoothness"] = (later - now).square().mean()
        read = self.inverse(torch.cat([now, later], dim=-1))                # (B,T-1,A)
        terms["inverse dynamics"] = (read - blocks).square().mean()
        loss = parts["prediction"]
        for name, term in terms.items():
            loss = loss + self.weights[name] * term
        return loss, {**parts, **terms}

# ======== Parts changed ===============================================================================

class LayerNorms(lewm.LeWM):
    """LeWM with LayerNorm in place of BatchNorm in both projectors."""
    def __init__(self, cfg):
        super().__init__(cfg)
        self.projector[1] = nn.LayerNorm(cfg.projector_hidden)
        self.pred_proj[1] = nn.LayerNorm(cfg.projector_hidden)

class AppendingPredictor(lewm.Predictor):
    """The predictor on embeddings with the encoded action appended. Its layers are plain: shift 0, scale 0
    and gate 1, whatever the action."""
    def __init__(self, cfg):
        super().__init__(cfg)
        W = cfg.predictor_width
        self.widen = nn.Linear(cfg.embed_dim + W, W)
        for layer in self.layers:
            modulation = layer.adaLN_modulation.requires_grad_(False)[-1]   # its weights are zeros
            modulation.bias.view(6, W)[[2, 5]] = 1                          # the two gates

    def forward(self, z, c):
        return super().forward(torch.cat([z, c], dim=-1), c)

class AppendedAction(lewm.LeWM):
    """LeWM with the action appended to the embedding, in place of AdaLN."""
    def __init__(self, cfg):
        super().__init__(cfg)
        self.predictor = AppendingPredictor(cfg)

# ======== The simulator ===============================================================================

class Simulator(nn.Module):
    """Push-T itself in the place of a LeWM. Its embedding is the state, scaled so that the limits of success,
    20 px and 20 degrees, are a distance of 1."""
    to_blocks = lewm.LeWM.to_blocks
    to_actions = lewm.LeWM.to_actions
    device = torch.device("cpu")
    proposal = None

    def __init__(self, cfg, action_statistics):
        super().__init__()
        self.cfg = cfg
        self.register_buffer("change", torch.eye(8))
        for name, numbers in zip(("mean", "std", "low", "high"), action_statistics):
            self.register_buffer(f"action_{name}", numbers)

    def encode(self, states):
        """states (...,7) -> (...,8): places, angle as cosine and sine, velocities that hardly count."""
        places = states[..., :4] / 20
        angle = states[..., 4:5]
        unit = math.radians(20)
        velocity = states[..., 5:] / 1e4
        return torch.cat([places, angle.cos() / unit, angle.sin() / unit, velocity], dim=-1)

    def decode(self, z):
        """`encode` undone: z (...,8) -> states (...,7)."""
        angle = torch.atan2(z[..., 5:6], z[..., 4:5]) % (2 * math.pi)
        return torch.cat([20 * z[..., :4], angle, 1e4 * z[..., 6:]], dim=-1)

    def rollout(self, z, plans):
        """z (B,1,8), plans (B,N,n,A) -> (B,N,n,8), by playing every plan."""
        actions = self.to_actions(plans).unflatten(2, (-1, self.cfg.frame_skip))    # (B,N,n,frame_skip,2)
        starts = self.decode(z[:, -1].double()).numpy()                     # (B,7)
        states = []
        for start, candidates in zip(starts, actions.numpy()):
            copies = [start] * len(candidates)
            states.append(probe.played(copies, candidates))                 # (N,n,7)
        return self.encode(torch.from_numpy(np.stack(states)))

class SeenState:
    """An environment of which a StatePlanner sees the state, and not a picture."""
    def __init__(self, environment):
        self.environment = environment

    def render(self):
        return self.environment.state

class StatePlanner(lewm.Planner):
    """lewm.Planner with states (7,) in place of pictures."""
    views = None                # a SeenState for each environment

    def encode(self, states):
        return self.model.encode(torch.from_numpy(np.stack(states)).float())

    def __call__(self, running, environments):
        self.views = self.views or [SeenState(environment) for environment in environments]
        return super().__call__(running, self.views)
