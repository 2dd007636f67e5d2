"""The language model of Qwen2.5-VL, read as an encoder: prompt and images in, one vector for each token out.

    ids (B, L), mask (B, L), patches (P, 1176), grids (n, 3)  ->  hidden (B, L, C), after the final norm

A causal decoder: nothing is generated, its last state simply is the embedding that the image transformer
reads. Image tokens stand in the sequence as `<|image_pad|>` and are replaced by the vision tower's output.
The surprise: a position is three numbers (time, row, column). They are equal for text; inside an image, time
stands still while row and column count, and the text behind it goes on after the image's longer side.
Matches hidden_states[-1] of transformers' Qwen2_5_VLForConditionalGeneration (tests/test_text_encoder.py),
given `mm_token_type_ids`; diffusers 0.42.1 on transformers 5 forgets those, and its images lose their rows
and columns (diffusers#14194). Chapter 07.
"""

import inspect

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from minqwen.checkpoint import refuse_uncomputed
from minqwen.files import expect_numbers
from minqwen.vision import Qwen2_5_VLVisionTower, RMSNorm, SwiGLU, inverse_frequencies, rotate


class TextAttention(nn.Module):
    """Causal attention in which groups of query heads share one head of keys and values (GQA)."""

    def __init__(self, dim: int, num_heads: int, num_kv_heads: int):
        super().__init__()
        self.head_dim, self.shared_by = dim // num_heads, num_heads // num_kv_heads
        self.q_proj = nn.Linear(dim, num_heads * self.head_dim)
        self.k_proj = nn.Linear(dim, num_kv_heads * self.head_dim)
        self.v_proj = nn.Linear(dim, num_kv_heads * self.head_dim)
        self.o_proj = nn.Linear(num_heads * self.head_dim, dim, bias=False)

    def forward(self, x: Tensor, angles: Tensor, mask: Tensor | None) -> Tensor:
        q = rearrange(self.q_proj(x), "b l (h d) -> b h l d", d=self.head_dim)
        k = rearrange(self.k_proj(x), "b l (h d) -> b h l d", d=self.head_dim)
        v = rearrange(self.v_proj(x), "b l (h d) -> b h l d", d=self.head_dim)
        q, k = rotate(q, angles), rotate(k, angles)
        k, v = k.repeat_interleave(self.shared_by, dim=1), v.repeat_interleave(self.shared_by, dim=1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.o_proj(rearrange(out, "b h l d -> b l (h d)"))


class TextLayer(nn.Module):
    def __init__(self, dim: int, num_heads: int, num_kv_heads: int, hidden: int, eps: float):
        super().__init__()
        self.self_attn = TextAttention(dim, num_heads, num_kv_heads)
        self.mlp = SwiGLU(dim, hidden, bias=False)
        self.input_layernorm = RMSNorm(dim, eps)
        self.post_attention_layernorm = RMSNorm(dim, eps)

    def forward(self, x: Tensor, angles: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), angles, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class Qwen2_5_VLTextModel(nn.Module):
    """The decoder without its output head: embeddings (B, L, C) and positions (3, B, L) -> (B, L, C)."""

    def __init__(
        self,
        vocab_size: int = 152064,
        hidden_size: int = 3584,
        intermediate_size: int = 18944,  # inside the SwiGLU
        num_hidden_layers: int = 28,
        num_attention_heads: int = 28,
        num_key_value_heads: int = 4,  # each shared by 7 query heads
        rms_norm_eps: float = 1e-6,  # transformers' own default is 1e-5
        rope_theta: float = 1000000.0,
        mrope_section: tuple[int, int, int] = (16, 24, 24),  # channel pairs that turn with time, row, column
    ):
        super().__init__()
        expect_numbers(rope_theta=rope_theta, rms_norm_eps=rms_norm_eps)
        heads, kv_heads, section = num_attention_heads, num_key_value_heads, tuple(mrope_section)
        if heads % kv_heads or len(section) != 3 or 2 * sum(section) * heads != hidden_size:
            raise ValueError(f"sizes do not fit: {hidden_size=}, {heads=}, {kv_heads=}, mrope_section {section}")
        self.head_dim, self.rope_theta, self.mrope_section = hidden_size // heads, rope_theta, section
        self.embed_tokens = nn.Embedding(vocab_size, hidden_size)
        sizes = hidden_size, heads, kv_heads, intermediate_size, rms_norm_eps
        self.layers = nn.ModuleList(TextLayer(*sizes) for _ in range(num_hidden_layers))
        self.norm = RMSNorm(hidden_size, rms_norm_eps)

    def forward(self, x: Tensor, positions: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        angles, mask = self._angles(positions), causal_mask(attention_mask)
        for layer in self.layers:
            x = layer(x, angles, mask)
        return self.norm(x)

    def _angles(self, positions: Tensor) -> Tensor:
        """(3, B, L) -> (B, 1, L, head_dim/2): each channel pair follows one of the three positions."""
        time, row, column = self.mrope_section
        axis = [0] * time + [1] * row + [2] * column
        turns = inverse_frequencies(self.head_dim, self.rope_theta, positions.device)
        return rearrange(positions, "three b l -> b 1 l three")[..., axis] * turns


def causal_mask(attention_mask: Tensor | None) -> Tensor | None:
    """(B, L) -> (B, 1, L, L), True where a query may look: at valid tokens up to itself. None: no padding."""
    if attention_mask is None or bool(attention_mask.all()):
        return None
    length, device = attention_mask.shape[1], attention_mask.device
    causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    itself = torch.eye(length, dtype=torch.bool, device=device)  # empty rows are NaN on some GPUs
    return (causal & attention_mask[:, None, None].bool()) | itself


def mrope_positions(
    input_ids: Tensor, attention_mask: Tensor | None, image_grid_thw: Tensor | None, image_token_id: int, merge: int = 2
) -> Tensor:
    """Time, row and column of every token: (3, B, L), integers; what stands in the padding means nothing.

    Each text token takes one step. An image of h×w tokens lies at a single time, spreads over rows and
    columns from there, and takes max(h, w) steps, however many tokens it has: behind 3 words and a 4×4 image
    the next word is at 7, not at 19. Source: Qwen2-VL paper, section 2.1 (M-RoPE); get_rope_index in
    transformers.
    """
    step, inside = torch.ones_like(input_ids), input_ids.new_zeros(3, *input_ids.shape)
    if attention_mask is not None:
        step = step * attention_mask
    if image_grid_thw is not None:
        places = (input_ids == image_token_id).nonzero().tolist()  # (row of the batch, token) of each image token
        for _, gh, gw in image_grid_thw.tolist():
            h, w = gh // merge, gw // merge
            b, start = places[0]
            image = slice(start, start + h * w)
            nth = torch.arange(h * w, device=input_ids.device)
            inside[1, b, image] = nth // w
            inside[2, b, image] = nth % w
            step[b, image] = 0
            step[b, image.stop - 1] = max(h, w)
            places = places[h * w :]
    return step.cumsum(1) - step + inside  # the steps of all tokens before, and the place in the image


COMPUTED = {"model_type": "qwen2_5_vl", "hidden_act": "silu", "use_sliding_window": False, "rope_type": "default"}


def read_config(config: dict) -> tuple[dict, dict, int]:
    """text_encoder/config.json, flat (as released) or nested (as transformers 5 saves it)
    -> keywords of Qwen2_5_VLTextModel, keywords of Qwen2_5_VLVisionTower, image_token_id.

    Flat keys win: the released file also holds a `text_config`, in which some values are null or differ. Keys
    that do not touch the computation are ignored. Raises ValueError for a model that is not computed here.
    """
    nested = config.get("text_config") or {}
    keys = {key: value for key, value in nested.items() if value is not None}
    keys |= {key: value for key, value in config.items() if value is not None}
    rope = keys.get("rope_scaling") or keys.get("rope_parameters") or {}
    rope_type = rope.get("rope_type") or rope.get("type") or "default"
    keys |= {"rope_type": "default" if rope_type == "mrope" else rope_type}  # two names of one thing
    refuse_uncomputed(keys, COMPUTED, "text_encoder/config.json")
    known = inspect.signature(Qwen2_5_VLTextModel).parameters
    text = {key: value for key, value in (keys | rope).items() if key in known and value is not None}
    return text, keys.get("vision_config", {}), keys.get("image_token_id", 151655)


def released_name(name: str) -> str | None:
    """A weight's name in the released shards, from that or from transformers 5's; None: not needed."""
    if name == "lm_head.weight":
        return None  # predicts words; we read the state before it
    return name.replace("model.language_model.", "model.", 1).replace("model.visual.", "visual.", 1)


class Qwen2_5_VLTextEncoder(nn.Module):
    """Keywords: text_encoder/config.json, in the flat (released) or the nested (transformers 5) form.

    The released values are the defaults; see Qwen2_5_VLTextModel, Qwen2_5_VLVisionTower and `read_config`.
    `load_state_dict` takes the released names and those of transformers 5, with or without lm_head.weight.
    """

    @staticmethod
    def released_name(name: str) -> str | None:
        return released_name(name)

    def __init__(self, **config):
        super().__init__()
        text, vision, self.image_token_id = read_config(config)
        self.model = Qwen2_5_VLTextModel(**text)
        self.visual = Qwen2_5_VLVisionTower(**vision)
        self.vocab_size, self.hidden_size = self.model.embed_tokens.weight.shape
        if (width := self.visual.merger.mlp[2].out_features) != self.hidden_size:
            raise ValueError(f"vision_config's out_hidden_size is {width}, hidden_size is {self.hidden_size}")
        self.register_load_state_dict_pre_hook(_use_released_names)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
    ) -> Tensor:
        """Token ids (B, L) -> states (B, L, hidden_size) after the final norm; in the padding, anything.

        attention_mask: (B, L), 1 or True for tokens, 0 for padding on either side; None: no padding.
        pixel_values (P, 1176), image_grid_thw (n, 3): the patches of all images of the batch, in the order of
        their tokens, as `tokenize_prompts` makes them; give both or neither.
        Raises ValueError when there are more or fewer image tokens than the images make.
        """
        if (pixel_values is None) != (image_grid_thw is None):
            raise ValueError("pixel_values and image_grid_thw come together: one of them is missing")
        image, merge = input_ids == self.image_token_id, self.visual.spatial_merge_size
        count, made = int(image.sum()), 0 if image_grid_thw is None else int(image_grid_thw.prod(-1).sum()) // merge**2
        if count != made:
            raise ValueError(f"input_ids hold {count} image tokens, id {self.image_token_id}; the images make {made}")
        x = self.model.embed_tokens(input_ids)
        if pixel_values is not None:
            x = x.masked_scatter(image[..., None], self.visual(pixel_values, image_grid_thw).to(x.dtype))
        positions = mrope_positions(input_ids, attention_mask, image_grid_thw, self.image_token_id, merge)
        return self.model(x, positions, attention_mask)


def _use_released_names(module, state_dict, prefix, *_):
    """Rename before loading; a name that would be taken twice stays, so that strict loading reports it."""
    for name in [name for name in state_dict if name.startswith(prefix)]:
        new = released_name(name.removeprefix(prefix))
        if new is None:
            del state_dict[name]
        elif prefix + new not in state_dict:
            state_dict[prefix + new] = state_dict.pop(name)
