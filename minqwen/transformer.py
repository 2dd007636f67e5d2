"""The whole transformer: noisy latents in, velocity out.

    image tokens (B, Ni, 64), text (B, Nt, 3584), sigma (B,)  ->  velocity (B, Ni, 64)

Ni counts the target's tokens and, behind them, those of the reference pictures; the caller keeps the first part.
The surprise: in the last norm `norm_out` the scale comes first and the shift second, in the blocks it is the
other way round.
Matches diffusers' QwenImageTransformer2DModel (tests/test_transformer.py). Chapter 05.
"""

from math import prod

import torch
import torch.nn.functional as F
from torch import nn

from minqwen.block import QwenImageTransformerBlock
from minqwen.rope import QwenEmbedRope
from minqwen.timestep import QwenTimestepProjEmbeddings

UNREAD_KEYS = ("pooled_projection_dim",)  # in the released config.json, read by nobody
OTHER_MODELS = {  # keys that are true in models which compute something else
    "guidance_embeds": "a guidance-distilled variant",
    "use_additional_t_cond": "Qwen-Image-Layered",
    "use_layer3d_rope": "Qwen-Image-Layered",
}
Modulations = tuple[list[tuple[torch.Tensor, torch.Tensor]], torch.Tensor]  # image and text of each block; the exit's


class AdaLayerNormContinuous(nn.Module):
    """LayerNorm modulated by temb: (B, N, C), (B, C) -> (B, N, C).

    modulations: ready-made, (B, 2C), as `modulations` gives them, and then temb is not read.
    """

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.linear = nn.Linear(dim, 2 * dim)
        self.norm = nn.LayerNorm(dim, elementwise_affine=False, eps=eps)

    def forward(
        self, x: torch.Tensor, temb: torch.Tensor | None, modulations: torch.Tensor | None = None
    ) -> torch.Tensor:
        vectors = self.modulations(temb) if modulations is None else modulations
        scale, shift = vectors[:, None].chunk(2, dim=-1)
        return self.norm(x) * (1 + scale) + shift

    def modulations(self, temb: torch.Tensor) -> torch.Tensor:
        """Scale and shift: (B, C) -> (B, 2C)."""
        return self.linear(F.silu(temb))


class QwenImageTransformer2DModel(nn.Module):
    """The denoiser of Qwen-Image, Qwen-Image-Edit, -Edit-2509 and (zero_cond_t) -Edit-2511.

    The keywords are the keys of transformer/config.json, the defaults are the released values; `config` keeps them.
    Raises ValueError for a variant that this class does not compute. Source: diffusers' class of this name; Qwen-Image
    Technical Report, 2025.
    """

    def __init__(
        self,
        patch_size: int = 2,  # latent pixels along each side of a token
        in_channels: int = 64,  # 16 latent channels * patch_size^2
        out_channels: int | None = 16,
        num_layers: int = 60,
        attention_head_dim: int = 128,  # D
        num_attention_heads: int = 24,  # H; the width C is H * D = 3072
        joint_attention_dim: int = 3584,  # width of the text encoder
        axes_dims_rope: tuple[int, int, int] = (16, 56, 56),  # frame, height, width; sums to D
        zero_cond_t: bool = False,  # Edit-2511: reference pictures are modulated as if at noise 0
        **other_keys,
    ):
        given = locals() | other_keys  # before any other name is bound here
        super().__init__()
        _check_config(other_keys, axes_dims_rope, attention_head_dim)
        ours = ("self", "other_keys")
        self.config = {key: value for key, value in given.items() if key not in ours and not key.startswith("_")}
        self.zero_cond_t = zero_cond_t
        dim = num_attention_heads * attention_head_dim
        self.pos_embed = QwenEmbedRope(10000, tuple(axes_dims_rope), scale_rope=True)
        self.time_text_embed = QwenTimestepProjEmbeddings(dim)
        self.txt_norm = nn.RMSNorm(joint_attention_dim, eps=1e-6)
        self.img_in = nn.Linear(in_channels, dim)
        self.txt_in = nn.Linear(joint_attention_dim, dim)
        self.transformer_blocks = nn.ModuleList(
            QwenImageTransformerBlock(dim, num_attention_heads, attention_head_dim, zero_cond_t=zero_cond_t)
            for _ in range(num_layers)
        )
        self.norm_out = AdaLayerNormContinuous(dim)
        self.proj_out = nn.Linear(dim, patch_size**2 * (out_channels or in_channels))

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_hidden_states_mask: torch.Tensor | None = None,
        timestep: torch.Tensor | None = None,
        img_shapes: list[list[tuple[int, int, int]]] | None = None,
        modulations: Modulations | None = None,
    ) -> torch.Tensor:
        """Velocity (noise minus clean latents) of every image token.

        hidden_states: packed latents (B, Ni, 64), target first, then references;
        encoder_hidden_states: prompt embeddings (B, Nt, 3584); encoder_hidden_states_mask (B, Nt) or None;
        timestep (B,): sigma in [0, 1]; img_shapes: for each sample the (frames, h, w) in tokens of target and
        references, the same for all samples of a batch; modulations: what the noise level says, made before by
        the `modulations` of blocks and exit, of one row if all samples have the same level. With them timestep is not
        read, and the layers that make them do not run  ->  (B, Ni, 64). Raises ValueError on a mismatch.
        """
        shapes = _common_shapes(hidden_states, img_shapes)
        img = self.img_in(hidden_states)
        txt = self.txt_in(self.txt_norm(encoder_hidden_states))
        of_blocks, of_exit = modulations or ([None] * len(self.transformer_blocks), None)
        temb = exit_temb = None
        if modulations is None:  # each block makes its own of temb, and so does the exit
            temb = self.embed_timestep(timestep, img)
            exit_temb = temb[: len(timestep)]  # not the rows of noise 0
        rotary = self.pos_embed(shapes, txt.shape[1], img.device)

        target_tokens = prod(shapes[0])
        for block, vectors in zip(self.transformer_blocks, of_blocks, strict=True):
            txt, img = block(img, txt, temb, encoder_hidden_states_mask, rotary, target_tokens, modulations=vectors)
        return self.proj_out(self.norm_out(img, exit_temb, of_exit))

    def embed_timestep(self, timestep: torch.Tensor | None, hidden_states: torch.Tensor) -> torch.Tensor:
        """sigma (B,) -> temb (B, C) in the dtype of hidden_states; zero_cond_t: (2B, C), the rows of noise 0 behind."""
        if timestep is None:
            raise ValueError("timestep is missing: pass the noise level of each sample, (B,), in [0, 1]")
        if self.zero_cond_t:
            timestep = torch.cat([timestep, timestep * 0])
        # diffusers rounds sigma to the model's dtype first; kept in float32 a bf16 model is nearer the truth
        return self.time_text_embed(timestep, hidden_states)


def _check_config(other_keys: dict, axes_dims_rope: tuple[int, int, int], attention_head_dim: int) -> None:
    for key, model in OTHER_MODELS.items():
        if other_keys.get(key):
            raise ValueError(f"config key {key}=true belongs to {model}, which minqwen does not compute")
    unknown = [key for key in other_keys if key not in (*OTHER_MODELS, *UNREAD_KEYS) and not key.startswith("_")]
    if unknown:
        raise ValueError(f"unknown transformer config keys {unknown}: a variant that minqwen does not know")
    if sum(axes_dims_rope) != attention_head_dim:
        raise ValueError(f"axes_dims_rope {axes_dims_rope} must sum to attention_head_dim {attention_head_dim}")


def _common_shapes(hidden_states: torch.Tensor, img_shapes) -> list[tuple[int, int, int]]:
    if not img_shapes:
        raise ValueError("img_shapes is missing: for each sample a list of (frames, height, width) in tokens")
    first, *others = [[sample] if isinstance(sample, tuple) else list(sample) for sample in img_shapes]
    if any(sample != first for sample in others):
        raise ValueError(f"all samples of a batch need the same image shapes, got {img_shapes}")
    tokens = sum(map(prod, first))
    if tokens != hidden_states.shape[1]:
        raise ValueError(f"img_shapes {first} make {tokens} tokens, hidden_states has {hidden_states.shape[1]}")
    return first
