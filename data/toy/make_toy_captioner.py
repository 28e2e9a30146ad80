"""The toy BLIP captioner: "a red chair" for a picture of a red chair. It stands in for the captioner that a
hub would give; make_toy_models.py --only blip trains it, five minutes on one core.

BLIP is pre-trained with a contrastive loss on the pooled vision output beside the captioning loss (Li et
al., 2022, section 3.2). Here, where a caption is one object and one colour, two linear heads on that output
play the contrastive loss' part. They are not saved.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
import transformers as hf
from torch import nn
from toy_images import COLOURS, SHAPES, SIZE, render
from tqdm import tqdm

OBJECT_NAMES, COLOUR_NAMES = list(SHAPES), list(COLOURS)
WIDTH = 128  # of both towers, and so of the visual embedding
IMAGES, EPOCHS, BATCH_SIZE, LR = 16_000, 6, 64, 1.5e-3


def make_processor():
    """BLIP's own kinds of image processor and tokenizer, for 80-pixel pictures and a vocabulary of a few
    dozen words."""
    letters = "abcdefghijklmnopqrstuvwxyz"  # any other word is spelled
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", *letters]
    words += [f"##{letter}" for letter in letters] + ["an"] + COLOUR_NAMES + OBJECT_NAMES
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(words))}
    tokenizer = hf.BertTokenizer(vocab=vocabulary, bos_token="[DEC]", model_max_length=16)
    return hf.BlipProcessor(hf.BlipImageProcessor(size={"height": SIZE, "width": SIZE}), tokenizer)


def make_model(tokenizer):
    """A BLIP of 1.1 million weights: 4-layer vision transformer on 10-pixel patches, 2-layer text decoder,
    both WIDTH wide."""
    # Weights start at a spread of about 1/sqrt(WIDTH); the usual 0.02 is for wider models and learns far
    # slower here.
    shared = dict(hidden_size=WIDTH, num_attention_heads=4, initializer_range=0.08)
    vision = dict(intermediate_size=384, num_hidden_layers=4, image_size=SIZE, patch_size=10, **shared)
    text = dict(
        vocab_size=len(tokenizer),
        encoder_hidden_size=WIDTH,
        intermediate_size=256,
        num_hidden_layers=2,
        max_position_embeddings=16,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.sep_token_id,
        sep_token_id=tokenizer.sep_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **shared,
    )
    widths = dict(projection_dim=WIDTH, image_text_hidden_size=WIDTH, initializer_range=0.08)
    config = hf.BlipConfig(vision_config=vision, text_config=text, **widths)
    return hf.BlipForConditionalGeneration(config)


def make_pictures(n):
    """n pictures [n, SIZE, SIZE, 3] uint8, and the numbers of their objects [n] and colours [n]; every
    combination is as frequent."""
    rng = np.random.default_rng([0, 0])
    combinations = len(SHAPES) * len(COLOURS)
    orders = [rng.permutation(combinations) for _ in range(math.ceil(n / combinations))]
    objects, colours = np.divmod(np.concatenate(orders)[:n], len(COLOURS))
    pixels = np.empty((n, SIZE, SIZE, 3), np.uint8)
    for i in tqdm(range(n), desc="render", mininterval=1):
        pixels[i] = render(OBJECT_NAMES[objects[i]], COLOUR_NAMES[colours[i]], rng)
    return tuple(map(torch.from_numpy, (pixels, objects, colours)))


def tokens_of(objects, colours, tokenizer):
    """Captions as token ids [n, T]: "a red chair", "an orange chair"."""
    captions = []
    for obj, colour in zip(objects, colours):
        name = COLOUR_NAMES[colour]
        captions.append(f"{'an' if name[0] in 'aeiou' else 'a'} {name} {OBJECT_NAMES[obj]}")
    tokens = tokenizer(captions, return_tensors="pt").input_ids
    tokens[:, 0] = tokenizer.bos_token_id
    return tokens


def train(model, processor, pixels, objects, colours):
    """Captioning loss plus the loss of two linear heads (object, colour) on the pooled vision output. The
    pictures of a batch are mirrored or not, and moved by up to four pixels."""
    scale = processor.image_processor
    mean, std = (torch.tensor(v).view(3, 1, 1) * 255 for v in (scale.image_mean, scale.image_std))
    tokens = tokens_of(objects, colours, processor.tokenizer)
    heads = nn.ModuleList([nn.Linear(WIDTH, len(SHAPES)), nn.Linear(WIDTH, len(COLOURS))])
    weights = [*model.parameters(), *heads.parameters()]
    matrices, vectors = [w for w in weights if w.ndim > 1], [w for w in weights if w.ndim <= 1]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.05}])
    optimizer.add_param_group({"params": vectors, "weight_decay": 0.0})
    steps = len(pixels) // BATCH_SIZE
    cycle = dict(total_steps=max(20, EPOCHS * steps), pct_start=0.1, cycle_momentum=False)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, **cycle)
    generator = torch.Generator().manual_seed(0)
    model.train()
    for epoch in range(EPOCHS):
        order = torch.randperm(len(pixels), generator=generator)
        bar = tqdm(range(steps), desc=f"epoch {epoch + 1}/{EPOCHS}", mininterval=1)
        for step in bar:
            rows = order[step * BATCH_SIZE : (step + 1) * BATCH_SIZE]
            images = (pixels[rows].permute(0, 3, 1, 2).float() - mean) / std
            flip, *shift = torch.randint(-4, 5, (3,), generator=generator).tolist()
            images = torch.roll(images.flip(3) if flip > 0 else images, shift, (2, 3))
            with torch.autocast("cpu", torch.bfloat16):  # the weights stay in single precision
                vision = model.vision_model(images)
                seen = vision.last_hidden_state
                loss = model.text_decoder(tokens[rows], encoder_hidden_states=seen, labels=tokens[rows]).loss
                guesses = [head(vision.pooler_output).float() for head in heads]
            of_heads = F.cross_entropy(guesses[0], objects[rows]) + F.cross_entropy(guesses[1], colours[rows])
            bar.set_postfix(caption_loss=loss.item(), refresh=False)
            optimizer.zero_grad()
            (loss + of_heads).backward()
            nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            schedule.step()


def make_captioner(out, share):
    """Trains a captioner with a share of the pictures and saves it to the folder `out`."""
    torch.manual_seed(0)
    processor = make_processor()
    model = make_model(processor.tokenizer)
    print(f"blip: {model.num_parameters():,} parameters")
    train(model, processor, *make_pictures(int(IMAGES * share)))
    model.half().save_pretrained(out)
    processor.save_pretrained(out)
    print(f"wrote {out}")
