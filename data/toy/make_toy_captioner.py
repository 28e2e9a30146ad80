"""Trains the toy BLIP captioner: "a red chair" for a picture of a red chair. It stands in for the captioner
that a hub would give.

Reads   nothing; pictures are rendered by toy_images.py
Writes  OUT_DIR (default data/toy/models/blip): model.safetensors in half precision, config, tokenizer
        and image processor, as transformers' `from_pretrained` reads them

    python data/toy/make_toy_captioner.py   # five minutes on one core
    python data/toy/make_toy_captioner.py --out-dir /tmp/b --images 1000 --epochs 1   # seconds, to try it

BLIP is pre-trained with a contrastive loss on the pooled vision output beside the captioning loss (Li et
al., 2022, section 3.2). Here, where a caption is one object and one colour, two linear heads on that output
play the contrastive loss' part. They are not saved.
"""

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
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
OUT_DIR = Path(__file__).resolve().parent / "models" / "blip"
IMAGES, EPOCHS = 16_000, 6


def caption_of(obj, colour):
    """The caption of a picture: "a red chair", "an orange chair"."""
    return f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {obj}"


def make_processor():
    """BLIP's own kinds of image processor and tokenizer, for 80-pixel pictures and a vocabulary of a few
    dozen words."""
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]"]
    letters = [
        prefix + c for prefix in ("", "##") for c in "abcdefghijklmnopqrstuvwxyz"
    ]  # any other word is spelled
    words = list(dict.fromkeys(specials + letters + ["an"] + COLOUR_NAMES + OBJECT_NAMES))
    tokenizer = BertTokenizer(
        vocab={word: i for i, word in enumerate(words)}, bos_token="[DEC]", model_max_length=16
    )
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
    return BlipForConditionalGeneration(
        BlipConfig(
            vision_config=vision,
            text_config=text,
            projection_dim=WIDTH,
            image_text_hidden_size=WIDTH,
            initializer_range=0.08,
        )
    )


def make_pictures(n, seed, desc=None):
    """n pictures [n, size, size, 3] uint8 with the numbers of their objects and colours; every combination
    is as frequent."""
    rng = np.random.default_rng(seed)
    combinations = len(SHAPES) * len(COLOURS)
    orders = [rng.permutation(combinations) for _ in range(math.ceil(n / combinations))]
    pairs = np.concatenate(orders)[:n]
    objects, colours = pairs // len(COLOURS), pairs % len(COLOURS)
    pixels = np.empty((n, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    for i in tqdm(range(n), desc=desc, disable=desc is None, mininterval=1):
        pixels[i] = render(OBJECT_NAMES[objects[i]], COLOUR_NAMES[colours[i]], rng, IMAGE_SIZE)
    return pixels, objects, colours


def train(model, processor, pixels, objects, colours, epochs, batch_size, lr, seed):
    """Captioning loss plus the loss of two linear heads (object, colour) on the pooled vision output."""
    tokenizer, scale = processor.tokenizer, processor.image_processor
    mean, std = (torch.tensor(v).view(3, 1, 1) * 255 for v in (scale.image_mean, scale.image_std))
    tokens = tokenizer(
        [caption_of(OBJECT_NAMES[o], COLOUR_NAMES[c]) for o, c in zip(objects, colours)], return_tensors="pt"
    ).input_ids
    tokens[:, 0] = tokenizer.bos_token_id
    objects, colours = torch.from_numpy(objects), torch.from_numpy(colours)
    heads = nn.ModuleList([nn.Linear(WIDTH, len(SHAPES)), nn.Linear(WIDTH, len(COLOURS))])
    weights = [*model.parameters(), *heads.parameters()]
    optimiser = torch.optim.AdamW(
        [
            {"params": [w for w in weights if w.ndim > 1], "weight_decay": 0.05},
            {"params": [w for w in weights if w.ndim <= 1], "weight_decay": 0.0},
        ]
    )
    steps = max(20, epochs * (len(pixels) // batch_size))  # the schedule needs a few
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, lr, total_steps=steps, pct_start=0.1, cycle_momentum=False
    )
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for epoch in range(epochs):
        order, losses = torch.randperm(len(pixels), generator=generator), []
        bar = tqdm(range(len(pixels) // batch_size), desc=f"epoch {epoch + 1}/{epochs}", mininterval=1)
        for step in bar:
            rows = order[step * batch_size : (step + 1) * batch_size]
            images = (torch.from_numpy(pixels[rows.numpy()]).permute(0, 3, 1, 2).float() - mean) / std
            flip, *shift = torch.randint(
                -4, 5, (3,), generator=generator
            ).tolist()  # cheap augmentation: mirror, move
            images = torch.roll(images.flip(3) if flip > 0 else images, shift, (2, 3))
            with torch.autocast("cpu", torch.bfloat16):  # the weights stay in single precision
                vision = model.vision_model(images)
                captions = model.text_decoder(
                    tokens[rows], encoder_hidden_states=vision.last_hidden_state, labels=tokens[rows]
                )
                guesses = [head(vision.pooler_output) for head in heads]
            loss = captions.loss + sum(
                nn.functional.cross_entropy(guess.float(), truth[rows])
                for guess, truth in zip(guesses, (objects, colours))
            )
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(weights, 1.0)
            optimiser.step()
            schedule.step()
            losses.append(captions.loss.item())
            bar.set_postfix(caption_loss=f"{np.mean(losses[-50:]):.3f}", refresh=False)
    model.eval()


@torch.no_grad()
def describe(model, processor, pixels, batch_size=100):
    """Greedy captions and pooled vision outputs [n, D], from one pass of the vision tower."""
    captions, pooled = [], []
    for start in range(0, len(pixels), batch_size):
        inputs = processor(images=list(pixels[start : start + batch_size]), return_tensors="pt")
        vision = model.vision_model(inputs.pixel_values)
        text = model.config.text_config
        ids = model.text_decoder.generate(
            torch.full((len(vision.pooler_output), 1), text.bos_token_id),
            encoder_hidden_states=vision.last_hidden_state,
            eos_token_id=text.sep_token_id,
            pad_token_id=text.pad_token_id,
            max_new_tokens=8,
            do_sample=False,
        )
        captions += processor.batch_decode(ids, skip_special_tokens=True)
        pooled.append(vision.pooler_output)
    return captions, torch.cat(pooled)


def evaluate(model_dir, pixels, objects, colours):
    """Figures of the saved captioner in single precision: shares of right captions, and how well the pooled
    vision output of one half of the pictures tells object and colour of the other half (nearest neighbour by
    cosine, ridge regression)."""
    model = BlipForConditionalGeneration.from_pretrained(model_dir, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(model_dir)
    start = time.time()
    captions, pooled = describe(model, processor, pixels)
    seconds = time.time() - start
    right_object = np.array([OBJECT_NAMES[o] in c.split() for o, c in zip(objects, captions)])
    right_colour = np.array([COLOUR_NAMES[k] in c.split() for k, c in zip(colours, captions)])
    figures = {
        "object": right_object.mean(),
        "colour": right_colour.mean(),
        "both": (right_object & right_colour).mean(),
        "images_per_second": len(pixels) / seconds,
    }
    half = len(pixels) // 2
    unit = nn.functional.normalize(pooled - pooled[:half].mean(0), dim=1)
    nearest = (unit[half:] @ unit[:half].T).argmax(1).numpy()
    for name, numbers in (("object", objects), ("colour", colours)):
        target = nn.functional.one_hot(torch.from_numpy(numbers[:half])).float()
        ridge = torch.linalg.solve(
            unit[:half].T @ unit[:half] + torch.eye(unit.shape[1]), unit[:half].T @ (target - target.mean(0))
        )
        guess = (unit[half:] @ ridge + target.mean(0)).argmax(1).numpy()
        figures[f"pooled_nearest_{name}"] = (numbers[:half][nearest] == numbers[half:]).mean()
        figures[f"pooled_linear_{name}"] = (guess == numbers[half:]).mean()
    wrong = [
        (caption_of(OBJECT_NAMES[o], COLOUR_NAMES[k]), c)
        for o, k, c, a, b in zip(objects, colours, captions, right_object, right_colour)
        if not (a and b)
    ]
    return {name: round(float(value), 4) for name, value in figures.items()}, wrong


def make_captioner(
    out_dir=OUT_DIR, seed=0, images=IMAGES, epochs=EPOCHS, batch_size=64, lr=1.5e-3, eval_images=2112
):
    """Trains a captioner, saves it to `out_dir` and returns its figures on fresh pictures."""
    start = time.time()
    torch.manual_seed(seed)
    processor = make_processor()
    model = make_model(processor.tokenizer)
    print(
        f"captioner: {sum(w.numel() for w in model.parameters()):,} weights, {images:,} pictures, "
        f"{epochs} epochs, {torch.get_num_threads()} threads"
    )
    train(model, processor, *make_pictures(images, [seed, 0], "render"), epochs, batch_size, lr, seed)
    model.half().save_pretrained(out_dir)
    processor.save_pretrained(out_dir)
    figures, wrong = evaluate(out_dir, *make_pictures(eval_images, [seed, 1]))
    figures["seconds"] = round(time.time() - start, 1)
    print("captions on fresh pictures:", figures)
    for truth, caption in wrong[:10]:
        print(f"  {truth!r} captioned {caption!r}")
    print(f"wrote {out_dir} ({sum(f.stat().st_size for f in Path(out_dir).iterdir()) / 1e6:.1f} MB)")
    return figures


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--out-dir", type=Path, default=OUT_DIR, help="folder of the captioner (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of weights, pictures and their order (default: %(default)s)"
    )
    parser.add_argument(
        "--images", type=int, default=IMAGES, help="training pictures to render (default: %(default)s)"
    )
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="passes over them (default: %(default)s)")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    make_captioner(args.out_dir, args.seed, args.images, args.epochs)


if __name__ == "__main__":
    main()
