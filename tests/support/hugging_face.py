"""Small models of the transformers library, from configurations, and with the adapters of peft: one row each."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import peft
import torch
import transformers as hf

from torchcurv import SecondOrderOptimizer

V, LABELS = 24, 3  # words, classes
TEXT = {
    "vocab_size": V, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "max_position_embeddings": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
DRY = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
ENCODER = {**TEXT, **DRY, "num_labels": LABELS}
LONGER = {**ENCODER, "max_position_embeddings": 20}  # whose positions start after the padding
VISION = {
    "image_size": 16, "patch_size": 8, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 24, "num_labels": LABELS,
}  # fmt: skip
SEQ2SEQ = {
    "vocab_size": V, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "dropout": 0.0,
}  # fmt: skip
WINDOWS = {
    "image_size": 16, "patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2,
    "num_labels": LABELS, "drop_path_rate": 0.0,
}  # fmt: skip
STAGES = {"hidden_sizes": [4, 6, 8, 8], "depths": [1, 1, 1, 1], "num_labels": LABELS, "drop_path_rate": 0.0}
SPEECH = {
    "vocab_size": V, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24,
    "conv_dim": (8, 8), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "mask_time_prob": 0.0,
    "ctc_loss_reduction": "mean", "layerdrop": 0.0,
}  # fmt: skip

Batch = dict[str, Any]


def _words(n: int = 4, t: int = 5) -> torch.Tensor:
    return torch.randint(3, V, (n, t))


def _of_text() -> Batch:
    x = _words()
    return {"input_ids": x, "labels": x}


def _of_classes() -> Batch:
    return {"input_ids": _words(), "labels": torch.arange(4) % LABELS}


def _of_images(size: int = 16) -> Batch:
    return {"pixel_values": torch.randn(4, 3, size, size), "labels": torch.arange(4) % LABELS}


def _of_pairs() -> Batch:
    return {"input_ids": _words(), "labels": _words(4, 3)}


def _of_clip() -> Batch:
    return {"input_ids": _words(), "pixel_values": torch.randn(4, 3, 16, 16), "return_loss": True}


def _of_sound() -> Batch:
    return {"input_values": torch.randn(2, 200), "labels": torch.randint(3, V, (2, 3))}


def _of_spectra() -> Batch:
    return {"input_features": torch.randn(4, 6, 16), "labels": _words(4, 3)}


def _row(model: str, config: str, batch: Callable[[], Batch], **options: Any) -> Callable[[], tuple[Any, Batch]]:
    def make() -> tuple[Any, Batch]:
        torch.manual_seed(0)
        return getattr(hf, model)(getattr(hf, config)(**options)), batch()

    return make


MODELS: dict[str, Callable[[], tuple[Any, Batch]]] = {
    "gpt2": _row("GPT2LMHeadModel", "GPT2Config", _of_text, vocab_size=V, n_embd=16, n_layer=2, n_head=2,
                 n_positions=16, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=1, eos_token_id=2),
    "gpt neo": _row("GPTNeoForCausalLM", "GPTNeoConfig", _of_text, vocab_size=V, hidden_size=16, num_layers=2,
                    num_heads=2, attention_types=[[["global", "local"], 1]], max_position_embeddings=16,
                    bos_token_id=1, eos_token_id=2),
    "gpt neox": _row("GPTNeoXForCausalLM", "GPTNeoXConfig", _of_text, **TEXT),
    "opt": _row("OPTForCausalLM", "OPTConfig", _of_text, vocab_size=V, hidden_size=16, num_hidden_layers=2,
                num_attention_heads=2, ffn_dim=24, max_position_embeddings=16, word_embed_proj_dim=16, dropout=0.0),
    "llama": _row("LlamaForCausalLM", "LlamaConfig", _of_text, **TEXT),
    "mistral": _row("MistralForCausalLM", "MistralConfig", _of_text, **TEXT, num_key_value_heads=1),
    "mixtral": _row("MixtralForCausalLM", "MixtralConfig", _of_text, **TEXT, num_key_value_heads=1,
                    num_local_experts=3, num_experts_per_tok=2),
    "phi3": _row("Phi3ForCausalLM", "Phi3Config", _of_text, **TEXT),
    "qwen2": _row("Qwen2ForCausalLM", "Qwen2Config", _of_text, **TEXT, num_key_value_heads=1),
    "qwen3": _row("Qwen3ForCausalLM", "Qwen3Config", _of_text, **TEXT, num_key_value_heads=1, head_dim=8),
    "qwen3 moe": _row("Qwen3MoeForCausalLM", "Qwen3MoeConfig", _of_text, **TEXT, num_key_value_heads=1, head_dim=8,
                      num_experts=3, num_experts_per_tok=2, moe_intermediate_size=8, decoder_sparse_step=1),
    "gpt-oss": _row("GptOssForCausalLM", "GptOssConfig", _of_text, **TEXT, num_key_value_heads=1, head_dim=8,
                    num_local_experts=3, num_experts_per_tok=2, sliding_window=4),
    "llama4": _row("Llama4ForCausalLM", "Llama4TextConfig", _of_text, **TEXT, num_key_value_heads=1, head_dim=8,
                   intermediate_size_mlp=16, num_local_experts=3, num_experts_per_tok=1, interleave_moe_layer_step=1),
    "deepseek v3": _row("DeepseekV3ForCausalLM", "DeepseekV3Config", _of_text, **TEXT, num_key_value_heads=2,
                        moe_intermediate_size=8, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
                        first_k_dense_replace=0, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4,
                        v_head_dim=8),
    "olmoe": _row("OlmoeForCausalLM", "OlmoeConfig", _of_text, **TEXT, num_experts=3, num_experts_per_tok=2),
    "gemma2": _row("Gemma2ForCausalLM", "Gemma2Config", _of_text, **TEXT, num_key_value_heads=1, head_dim=8),
    "gemma3": _row("Gemma3ForCausalLM", "Gemma3TextConfig", _of_text, **TEXT, num_key_value_heads=1, head_dim=8),
    "phi": _row("PhiForCausalLM", "PhiConfig", _of_text, **TEXT),
    "falcon": _row("FalconForCausalLM", "FalconConfig", _of_text, vocab_size=V, hidden_size=16, num_hidden_layers=2,
                   num_attention_heads=2, bos_token_id=1, eos_token_id=2),
    "bloom": _row("BloomForCausalLM", "BloomConfig", _of_text, vocab_size=V, hidden_size=16, n_layer=2, n_head=2),
    "mamba": _row("MambaForCausalLM", "MambaConfig", _of_text, vocab_size=V, hidden_size=16, num_hidden_layers=1,
                  state_size=4),
    "bert, masked words": _row("BertForMaskedLM", "BertConfig", _of_text, **TEXT, **DRY),
    "bert": _row("BertForSequenceClassification", "BertConfig", _of_classes, **ENCODER),
    "roberta": _row("RobertaForSequenceClassification", "RobertaConfig", _of_classes, **LONGER),
    "albert": _row("AlbertForSequenceClassification", "AlbertConfig", _of_classes, **ENCODER, embedding_size=8,
                   classifier_dropout_prob=0.0),
    "distilbert": _row("DistilBertForSequenceClassification", "DistilBertConfig", _of_classes, vocab_size=V, dim=16,
                       n_layers=2, n_heads=2, hidden_dim=24, max_position_embeddings=16, num_labels=LABELS,
                       dropout=0.0, attention_dropout=0.0, seq_classif_dropout=0.0),
    "electra": _row("ElectraForSequenceClassification", "ElectraConfig", _of_classes, **ENCODER, embedding_size=8),
    "deberta v2": _row("DebertaV2ForSequenceClassification", "DebertaV2Config", _of_classes, **ENCODER,
                       relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=4),
    "mpnet": _row("MPNetForSequenceClassification", "MPNetConfig", _of_classes, **LONGER),
    "xlnet": _row("XLNetForSequenceClassification", "XLNetConfig", _of_classes, vocab_size=V, d_model=16, n_layer=1,
                  n_head=2, d_inner=24, num_labels=LABELS, dropout=0.0, summary_last_dropout=0.0),
    "t5": _row("T5ForConditionalGeneration", "T5Config", _of_pairs, vocab_size=V, d_model=16, d_ff=24, d_kv=8,
               num_layers=1, num_heads=2, decoder_start_token_id=0, dropout_rate=0.0),
    "bart": _row("BartForConditionalGeneration", "BartConfig", _of_pairs, **SEQ2SEQ, max_position_embeddings=16),
    "whisper": _row("WhisperForConditionalGeneration", "WhisperConfig", _of_spectra, **SEQ2SEQ, num_mel_bins=6,
                    max_source_positions=8, max_target_positions=8, pad_token_id=0, bos_token_id=1, eos_token_id=2,
                    decoder_start_token_id=1, suppress_tokens=None, begin_suppress_tokens=None),
    "vit": _row("ViTForImageClassification", "ViTConfig", _of_images, **VISION),
    "deit": _row("DeiTForImageClassification", "DeiTConfig", _of_images, **VISION, **DRY),
    "dinov2": _row("Dinov2ForImageClassification", "Dinov2Config", _of_images, drop_path_rate=0.0, **DRY,
                   **{k: x for k, x in VISION.items() if k != "intermediate_size"}),
    "beit": _row("BeitForImageClassification", "BeitConfig", _of_images, **VISION, **DRY, drop_path_rate=0.0,
                 use_relative_position_bias=True),
    "swin": _row("SwinForImageClassification", "SwinConfig", _of_images, **WINDOWS),
    "swin v2": _row("Swinv2ForImageClassification", "Swinv2Config", _of_images, **WINDOWS),
    "convnext": _row("ConvNextForImageClassification", "ConvNextConfig", lambda: _of_images(32), **STAGES),
    "convnext v2": _row("ConvNextV2ForImageClassification", "ConvNextV2Config", lambda: _of_images(32), **STAGES),
    "resnet": _row("ResNetForImageClassification", "ResNetConfig", lambda: _of_images(32), embedding_size=4,
                   hidden_sizes=[8, 8], depths=[1, 1], num_labels=LABELS),
    "mobilenet v2": _row("MobileNetV2ForImageClassification", "MobileNetV2Config", lambda: _of_images(32),
                         depth_multiplier=0.2, image_size=32, num_labels=LABELS, classifier_dropout_prob=0.0),
    "segformer": _row("SegformerForImageClassification", "SegformerConfig", _of_images, num_encoder_blocks=2,
                      depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[4, 8], patch_sizes=[7, 3], strides=[4, 2],
                      num_attention_heads=[1, 2], mlp_ratios=[2, 2], num_labels=LABELS, drop_path_rate=0.0),
    "clip": _row("CLIPModel", "CLIPConfig", _of_clip, text_config=TEXT, projection_dim=8,
                 vision_config={key: value for key, value in VISION.items() if key != "num_labels"}),
    "wav2vec2, ctc": _row("Wav2Vec2ForCTC", "Wav2Vec2Config", _of_sound, **SPEECH),
    "perceiver": _row("PerceiverForSequenceClassification", "PerceiverConfig",
                      lambda: {"inputs": _words(), "labels": torch.arange(4) % LABELS}, vocab_size=V, num_latents=3,
                      d_latents=8, d_model=8, num_blocks=1, num_self_attends_per_block=1, num_self_attention_heads=2,
                      num_cross_attention_heads=2, max_position_embeddings=16, num_labels=LABELS,
                      attention_probs_dropout_prob=0.0),
}  # fmt: skip


def trained(name: str, steps: int = 8) -> tuple[Any, Any, list[float]]:
    """(the model, its optimizer, the loss of each step) with nothing said but the model."""
    model, batch = MODELS[name]()
    model.train()
    optimizer, losses = SecondOrderOptimizer(model), []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return model, optimizer, losses


def two_of(name: str) -> tuple[Any, Batch]:
    """A model in float64 that draws nothing, and two samples."""
    model, batch = MODELS[name]()
    batch = {k: x[:2] if isinstance(x, torch.Tensor) else x for k, x in batch.items()}
    wide = {k: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for k, x in batch.items()}
    return model.double().eval(), wide


def counted(name: str, model: Any, batch: Batch) -> torch.Tensor:
    """The logits [terms, classes] whose cross entropies the loss averages."""
    logits, labels = model(**batch).logits, batch["labels"]
    if logits.dim() == 2:
        return logits
    if "masked" not in name and name not in ("t5", "bart", "whisper"):  # of the next word, from the last prompt on
        before = logits.shape[1] - labels.shape[1]
        logits = logits[:, max(0, before - 1) : -1]
    return logits.flatten(0, 1)


ADAPTERS: dict[str, Callable[[list[str]], Any]] = {
    "LoRA": lambda into: peft.LoraConfig(r=2, target_modules=into, task_type="CAUSAL_LM"),
    "DoRA": lambda into: peft.LoraConfig(r=2, use_dora=True, target_modules=into, task_type="CAUSAL_LM"),
    "IA3": lambda into: peft.IA3Config(target_modules=into, feedforward_modules=[], task_type="CAUSAL_LM"),
    "prefixes": lambda into: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    "prompts": lambda into: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
}


def _adapted(name: str, adapter: str, into: list[str]) -> Callable[[], tuple[Any, Batch]]:
    def make() -> tuple[Any, Batch]:
        model, batch = MODELS[name]()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of peft, about names of transformers
            return peft.get_peft_model(model, ADAPTERS[adapter](into)), batch

    return make


MODELS |= {
    f"{name}, {adapter}": _adapted(name, adapter, into)
    for name, into in (("gpt2", ["c_attn"]), ("llama", ["q_proj", "v_proj"]))
    for adapter in ADAPTERS
}
