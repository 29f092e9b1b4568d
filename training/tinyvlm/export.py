"""Writes the trained model as a Transformers folder: weights, tokenizer, processor, settings."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any, Final

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessor,
    GenerationConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from reroute.demo.tinyvlm import vocabulary as vocab
from reroute.demo.tinyvlm.scenes import PATCH, SIDE

# Images first, then the question, wherever in the message the image stands: the model was
# trained on that order alone.
CHAT_TEMPLATE: Final = (
    "{% for message in messages %}{% if message['role'] == 'user' %}user : "
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% endif %}{% endfor %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }} {% endif %}{% endfor %}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant :{% endif %}"
)
LONGEST_ANSWER: Final = 6


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per word, words separated by spaces."""
    core = Tokenizer(models.WordLevel(vocab.TOKENS, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocab.BOS)])
    wrap: Any = PreTrainedTokenizerFast  # not annotated
    fast: PreTrainedTokenizerFast = wrap(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
        padding_side="left",
        model_max_length=512,
    )
    return fast


def processor() -> LlavaProcessor:
    """Tokenizer, image preparation and chat template in one."""
    images = CLIPImageProcessor(
        size={"height": SIDE, "width": SIDE},
        do_resize=True,
        do_center_crop=False,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        do_convert_rgb=True,
    )
    join: Any = LlavaProcessor  # not annotated
    joined: LlavaProcessor = join(
        image_processor=images,
        tokenizer=tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # the tower's class token, which "default" drops
        image_token="<image>",
        chat_template=CHAT_TEMPLATE,
    )
    return joined


def write(model: LlavaForConditionalGeneration, folder: Path) -> None:
    """Write the folder as a whole or not at all; weights in float16."""
    fresh = folder.with_name(folder.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    duplicate: Any = copy.deepcopy(model)
    half = duplicate.half()
    settings: Any = GenerationConfig
    half.generation_config = settings(
        bos_token_id=vocab.BOS,
        eos_token_id=vocab.EOS,
        pad_token_id=vocab.PAD,
        max_new_tokens=LONGEST_ANSWER,
        do_sample=False,
    )
    half.save_pretrained(fresh)
    processor().save_pretrained(fresh)
    for file in fresh.iterdir():
        file.chmod(0o644)  # safetensors makes its file readable for its owner alone
    shutil.rmtree(folder, ignore_errors=True)
    fresh.rename(folder)
