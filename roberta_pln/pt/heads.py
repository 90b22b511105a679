"""The heads: each its extra modules and a short forward."""

import torch.nn.functional as F
from torch import Tensor, nn

from roberta_pln.config import RobertaPreLayerNormConfig
from roberta_pln.outputs import MaskedLMOutput
from roberta_pln.pt.losses import cross_entropy
from roberta_pln.pt.model import RobertaPreLayerNormModel
from roberta_pln.pt.pretrained import RobertaPreLayerNormPreTrainedModel


class LMHead(nn.Module):
    """decoder(LN(gelu(dense(x)))), (B, T, D) -> (B, T, V). The decoder shares the word embeddings unless untied."""

    def __init__(self, config: RobertaPreLayerNormConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)
        self.bias = self.decoder.bias

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.decoder(self.layer_norm(F.gelu(self.dense(hidden_states))))


class RobertaPreLayerNormForMaskedLM(RobertaPreLayerNormPreTrainedModel):
    """The encoder with a language-model head that predicts every token from both sides."""

    head = "ForMaskedLM"

    def __init__(self, config: RobertaPreLayerNormConfig) -> None:
        super().__init__(config)
        self.roberta_prelayernorm = RobertaPreLayerNormModel(config, add_pooling_layer=False)
        self.lm_head = LMHead(config)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> MaskedLMOutput | tuple:
        """Run the model; arguments are those of `RobertaPreLayerNormModel`, and

        Args:
            labels: (B, T) token ids to predict, -100 where nothing is.

        Returns:
            A `MaskedLMOutput`; its loss is None without labels and NaN when every label is -100.
        """
        record = self.roberta_prelayernorm(
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            head_mask,
            inputs_embeds,
            encoder_hidden_states,
            encoder_attention_mask,
            use_cache=False,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        logits = self.lm_head(record.last_hidden_state)
        loss = None if labels is None else cross_entropy(logits, self.ids("labels", labels, tuple(logits.shape[:-1])))
        return self.returned(MaskedLMOutput(loss, logits, record.hidden_states, record.attentions), return_dict)
