"""A config.json, read to the last switch: what nobody reads and may change numbers is refused by name."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from jeagle.errors import UserError

# Keys of a config.json that change no number of a forward pass over text.
_INERT = """
    _attn_implementation _attn_implementation_autoset _attn_implementation_internal _commit_hash
    _flash_attn_2_enabled _name_or_path _sliding_window_pattern add_cross_attention architectures
    attn_implementation audio_config audio_token_id auto_map aux_loss_alpha
    bad_words_ids begin_suppress_tokens boa_token_id boi_token_id boi_token_index bos_token_id
    cache_implementation chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id
    diversity_penalty do_sample dtype early_stopping embd_pdrop encoder_no_repeat_ngram_size eoa_token_id
    eoa_token_index eoi_token_id eoi_token_index eos_token_id ep_size experts_implementation
    exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id
    gradient_checkpointing head_dim_key id2label image_token_id image_token_index initial_context_length
    initializer_range is_decoder is_encoder_decoder is_llama_config label2id language_model_only length_penalty
    loss_type max_length max_new_tokens max_position_embeddings max_sequence_length max_window_layers min_length
    min_p mm_tokens_per_image model_max_length model_type mtp_loss_scaling mtp_num_hidden_layers
    mtp_use_dedicated_embeddings multimodal_projector_bias no_repeat_ngram_size no_rope_layer_interval
    num_beam_groups num_beams num_nextn_predict_layers num_return_sequences output_attentions output_dropout
    output_hidden_states output_router_logits output_scores pad_token_id partial_rotary_factor prefix
    pretraining_tp problem_type projector_hidden_act pruned_heads quantization_config remove_invalid_values
    repetition_penalty resid_pdrop return_dict return_dict_in_generate rope_local_base_freq rope_scaling
    rope_theta router_aux_loss_coef router_jitter_noise sep_token_id seq_aux sliding_window_pattern
    spatial_merge_size suppress_tokens task_specific_params temperature tie_encoder_decoder tie_word_embeddings
    tokenizer_class top_k top_p torch_dtype torchscript transformers.js_config transformers_version
    type_vocab_size typical_p unsloth_fixed unsloth_version use_bfloat16 use_cache use_mambapy video_token_id
    vision_config vision_end_token_id vision_feature_layer vision_start_token_id
"""
INERT = frozenset(_INERT.split())


class Switches:
    """A config.json with the defaults of its model type, and a record of what has been read of it."""

    def __init__(self, architecture: str, values: dict[str, Any]):
        self.architecture, self._values = architecture, values
        self._read: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        if self._values.get(name) is None:
            raise UserError(f"The target's config.json lacks {name}, which {self.architecture} needs.")
        return self.get(name)

    def get(self, name: str, default: Any = None) -> Any:
        """A switch's value; `default` where it is absent or null."""
        self._read.add(name)
        value = self._values.get(name)
        return default if value is None else value

    def was_read(self, name: str) -> bool:
        return name in self._read

    def only(self, **honoured: Iterable[Any]) -> None:
        """UserError unless each switch has one of the values given (or is absent)."""
        for name, values in honoured.items():
            value = self.get(name)
            if value is not None and value not in values:
                raise UserError(
                    f"The target's config.json has {name} = {value!r}, which changes its numbers and is not supported "
                    f"for {self.architecture} (supported: {', '.join(map(repr, values))})."
                )

    def finish(self) -> None:
        """UserError if a switch that could change numbers has not been read."""
        for name in sorted(set(self._values) - self._read - INERT):
            value = self._values[name]
            if "dropout" not in name and value is not None and value is not False and value not in ({}, []):
                raise UserError(
                    f"The target's config.json has {name} = {value!r}, which jeagle does not know for "
                    f"{self.architecture}: it may change the model's numbers, so it is refused."
                )
