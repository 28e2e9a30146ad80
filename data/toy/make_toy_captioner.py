"""The toy BLIP captioner: "a red chair" for a picture of a red chair. It stands in for the captioner that a
hub would give; make_toy_models.py --only blip trains it, five minutes on one core.

BLIP is pre-trained with a contrastive loss on the pooled vision output beside the captioning loss (Li et
al., 2022, section 3.2). Here, where a caption is one object and one colour, two linear heads on that output
play the contrastive loss' part. They are not saved.
"""

import math
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from toy_images import COLOURS, SHAPES, render
from tqdm import tqdm
from transformers import (
    AutoProcessor,
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
)

OBJECT_NAMES, COLOUR_NAMES = list(SHAPES), list(COLOURS)
IMAGE_SIZE = 80
WIDTH = 128  # of both towers, and so of the visual embedding
IMAGES, EPOCHS, BATCH_SIZE, LR = 16_000, 6, 64, 1.5e-3
EVAL_IMAGES = 2112


def make_processor():
    """BLIP's own kinds of image processor and tokenizer, for 80-pixel pictures and a vocabulary of a few
    dozen words."""
    letters = "abcdefghijklmnopqrstuvwxyz"  # any other word is spelled
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", *letters]
    words += [f"##{letter}" for letter in letters] + ["an"] + COLOUR_NAMES + OBJECT_NAMES
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(words))}
    tokenizer = BertTokenizer(vocab=vocabulary, bos_token="[DEC]", model_max_length=16)
    return BlipProcessor(BlipImageProcessor(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}), tokenizer)


def make_model(tokenizer):
    """A BLIP of 1.1 million weights: 4-layer vision transformer on 10-pixel patches, 2-layer text decoder,
    both WIDTH wide."""
    # Weights start at a spread of about 1/sqrt(WIDTH); the usual 0.02 is for wider models and learns far
    # slower here.
    shared = dict(hidden_size=WIDTH, num_attention_heads=4, initializer_range=0.08)
    vision = dict(intermediate_size=384, num_hidden_layers=4, image_size=IMAGE_SIZE, patch_size=10, **shared)
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
    return BlipForConditionalGeneration(BlipConfig(vision_config=vision, text_config=text, **widths))


def make_pictures(n, seed):
    """n pictures [n, size, size, 3] uint8 with the numbers of their objects and colours [2, n]; every
    combination is as frequent."""
    rng = np.random.default_rng(seed)
    combinations = len(SHAPES) * len(COLOURS)
    orders = [rng.permutation(combinations) for _ in range(math.ceil(n / combinations))]
    pairs = np.concatenate(orders)[:n]
    things = np.stack([pairs // len(COLOURS), pairs % len(COLOURS)])
    pixels = np.empty((n, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    for i in tqdm(range(n), desc="render", mininterval=1):
        obj, colour = things[:, i]
        pixels[i] = render(OBJECT_NAMES[obj], COLOUR_NAMES[colour], rng, IMAGE_SIZE)
    return pixels, things


def tokens_of(things, tokenizer):
    """Captions as token ids [n, T]: "a red chair", "an orange chair"."""
    captions = []
    for obj, colour in things.T:
        name = COLOUR_NAMES[colour]
        captions.append(f"{'an' if name[0] in 'aeiou' else 'a'} {name} {OBJECT_NAMES[obj]}")
    tokens = tokenizer(captions, return_tensors="pt").input_ids
    tokens[:, 0] = tokenizer.bos_token_id
    return tokens


def augmented(images, generator):
    """Images [B, 3, H, W], mirrored or not, and moved by up to four pixels: cheap augmentation."""
    flip, *shift = torch.randint(-4, 5, (3,), generator=generator).tolist()
    return torch.roll(images.flip(3) if flip > 0 else images, shift, (2, 3))


def make_optimizer(weights, steps):
    """AdamW without decay of biases and norms, and one cycle of the learning rate."""
    groups = [
        {"params": [w for w in weights if w.ndim > 1], "weight_decay": 0.05},
        {"params": [w for w in weights if w.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups)
    cycle = torch.optim.lr_scheduler.OneCycleLR
    return optimizer, cycle(optimizer, LR, total_steps=steps, pct_start=0.1, cycle_momentum=False)


def train(model, processor, pixels, things):
    """Captioning loss plus the loss of two linear heads (object, colour) on the pooled vision output."""
    scale = processor.image_processor
    mean, std = (torch.tensor(v).view(3, 1, 1) * 255 for v in (scale.image_mean, scale.image_std))
    tokens = tokens_of(things, processor.tokenizer)
    objects, colours = torch.from_numpy(things)
    heads = nn.ModuleList([nn.Linear(WIDTH, len(SHAPES)), nn.Linear(WIDTH, len(COLOURS))])
    weights = [*model.parameters(), *heads.parameters()]
    steps = len(pixels) // BATCH_SIZE
    optimizer, schedule = make_optimizer(weights, max(20, EPOCHS * steps))  # the schedule needs a few
    generator = torch.Generator().manual_seed(0)
    model.train()
    for epoch in range(EPOCHS):
        order, losses = torch.randperm(len(pixels), generator=generator), []
        bar = tqdm(range(steps), desc=f"epoch {epoch + 1}/{EPOCHS}", mininterval=1)
        for step in bar:
            rows = order[step * BATCH_SIZE : (step + 1) * BATCH_SIZE]
            images = (torch.from_numpy(pixels[rows.numpy()]).permute(0, 3, 1, 2).float() - mean) / std
            images = augmented(images, generator)
            with torch.autocast("cpu", torch.bfloat16):  # the weights stay in single precision
                vision = model.vision_model(images)
                seen = vision.last_hidden_state
                loss = model.text_decoder(tokens[rows], encoder_hidden_states=seen, labels=tokens[rows]).loss
                guessed_objects, guessed_colours = (head(vision.pooler_output) for head in heads)
            losses.append(loss.item())
            bar.set_postfix(caption_loss=f"{np.mean(losses[-50:]):.3f}", refresh=False)
            of_heads = F.cross_entropy(guessed_objects.float(), objects[rows])
            of_heads = of_heads + F.cross_entropy(guessed_colours.float(), colours[rows])
            optimizer.zero_grad()
            (loss + of_heads).backward()
            nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            schedule.step()
    model.eval()


@torch.no_grad()
def describe(model, processor, pixels, batch_size=100):
    """Greedy captions of pictures."""
    captions = []
    for start in range(0, len(pixels), batch_size):
        inputs = processor(images=list(pixels[start : start + batch_size]), return_tensors="pt")
        ids = model.generate(inputs.pixel_values, max_new_tokens=8, do_sample=False)
        captions += processor.batch_decode(ids, skip_special_tokens=True)
    return captions


def evaluate(model_dir, pixels, things):
    """Shares of right captions of the saved captioner, in single precision, and its speed."""
    model = BlipForConditionalGeneration.from_pretrained(model_dir, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(model_dir)
    start = time.time()
    captions = [caption.split() for caption in describe(model, processor, pixels)]
    seconds = time.time() - start
    right_object, right_colour = (
        np.array([names[number] in caption for number, caption in zip(numbers, captions)])
        for names, numbers in zip((OBJECT_NAMES, COLOUR_NAMES), things)
    )
    figures = {"object": right_object, "colour": right_colour, "both": right_object & right_colour}
    figures = {name: round(float(right.mean()), 4) for name, right in figures.items()}
    return figures | {"images_per_second": round(len(pixels) / seconds, 4)}


def make_captioner(out, share=1.0):
    """Trains a captioner with a share of the pictures and saves it to the folder `out`; yields ("blip", its
    figures on fresh pictures)."""
    start = time.time()
    torch.manual_seed(0)
    processor = make_processor()
    model = make_model(processor.tokenizer)
    print(f"blip: {model.num_parameters():,} parameters")
    pixels, things = make_pictures(int(IMAGES * share), [0, 0])
    train(model, processor, pixels, things)
    model.half().save_pretrained(out)
    processor.save_pretrained(out)
    figures = evaluate(out, *make_pictures(EVAL_IMAGES, [0, 1]))
    yield "blip", figures | {"seconds": round(time.time() - start, 1)}
