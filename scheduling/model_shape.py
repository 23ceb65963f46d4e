"""The numbers of a model that decide what it costs and holds; no tensors (cost.py, memory.py)."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """The numbers of a decoder-only transformer that decide its cost."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    vocab_size: int
    qk_norm: bool = False
    fused: bool = False  # q, k and v are one module with one A, and so are gate and up
    zero_centred: bool = False  # norms multiply by 1 + w, in float32
    post_norms: bool = False  # attention's and the MLP's results are normed too
    scaled: bool = False  # or multiplied
    num_ropes: int = 1
    capped_scores: bool = False  # of attention, which plain torch then computes
    capped_logits: bool = False
    num_experts: int = 0  # of a layer, each an MLP of ffn_size; 0: one MLP
    top_k: int = 0  # experts of a token

    @property
    def layer_params(self) -> int:
        """Weights of one layer's linears (q, k, v, o, gate, up, down) that a token meets, the router's included."""
        return self._weights(self.top_k)

    @property
    def layer_weights(self) -> int:
        """Weights of one layer's linears, all experts and the router included."""
        return self._weights(self.num_experts)

    def _weights(self, num_experts: int) -> int:
        attention = self.hidden_size * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)
        return attention + self.hidden_size * (3 * self.ffn_size * max(1, num_experts) + self.num_experts)

    @property
    def head_params(self) -> int:
        """Weights of the output head (and of the embedding)."""
        return self.hidden_size * self.vocab_size

    @property
    def lora_width(self) -> int:
        """Sum of K + N over the linears of a layer: LoRA weights per layer and rank, all modules targeted."""
        query, key_value = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        if self.num_experts:  # attention's alone
            return 4 * self.hidden_size + 2 * (query + key_value)
        num_inputs = 4 if self.fused else 7
        return num_inputs * self.hidden_size + (query + 2 * key_value) + query + 3 * self.ffn_size

    @property
    def expert_lora_width(self) -> int:
        """The same of the experts that a token has."""
        return self.top_k * 3 * (self.hidden_size + self.ffn_size)
