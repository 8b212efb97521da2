"""What the templates say and how they are laid out: steps from left to right, each with its columns of nodes and notes.

The nodes and their settings are in example_workflows/api/<name>.json; a column names them by their ids.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Note:
    """Markdown in a box as wide as its column and `height` pixels high."""

    title: str
    text: str
    height: int


@dataclass(frozen=True)
class Column:
    """Node ids and notes from top to bottom; `width` in pixels."""

    items: tuple[str | Note, ...]
    width: int = 280


@dataclass(frozen=True)
class Step:
    """A numbered group."""

    title: str
    columns: tuple[Column, ...]


def column(*items: str | Note, width: int = 280) -> Column:
    return Column(items, width)


def step(title: str, *columns: Column) -> Step:
    return Step(title, columns)


OWN_IMAGES = Note(
    "Your own images",
    "Put them into a folder inside ComfyUI's `input`, each with a caption in a `.txt` file of the same name, and "
    "choose that folder in *Load Caption Dataset*.",
    150,
)
TRAINING = (
    "While it trains, the node shows the loss and the samples. **Cancel** loses nothing: *Run* continues from there. "
    "*Stop and keep* saves the LoRA as it is."
)


def real_sdxl(title: str, more: str = "") -> Note:
    text = (
        "This graph is for real SDXL and names `sd_xl_base_1.0.safetensors` in `models/checkpoints`. Any other SDXL "
        "checkpoint will do: choose it in the first node."
    )
    return Note(title, f"{text}{more}", 150)


TEMPLATES: dict[str, tuple[Step, ...]] = {
    "train_and_compare": (
        step(
            "Data",
            column(
                "1",
                "2",
                Note(
                    "Train, then compare",
                    "Press **Run**. A tiny SDXL and 24 images come with the pack: it takes a minute or two without a "
                    "GPU.",
                    110,
                ),
                width=250,
            ),
        ),
        step(
            "Train",
            column(
                "10",
                Note(
                    "Samples while it trains",
                    f"`sample_every` 50: every 50 steps the prompts of *Train SDXL LoRA* are generated.\n\n{TRAINING}",
                    210,
                ),
                Note(
                    "Real SDXL",
                    "The template *train_and_compare_sdxl* has the values for it: resolution, width and height 1024, "
                    "1000 steps, learning rate 0.0001.",
                    150,
                ),
                width=240,
            ),
            column("3", width=290),
        ),
        step("Compare: same prompts, same seeds", column("5", width=250), column("4", width=250)),
        step("Score", column("6", width=250), column("7", width=250)),
    ),
    "train_and_watch": (
        step("Data", column("1", "2", OWN_IMAGES)),
        step(
            "Train and watch",
            column(
                "3",
                Note(
                    "Keep the best step",
                    "Five of the 24 images are held out. Every 20 steps the loss on them is measured and the sample "
                    "prompts are generated and scored. After three measurements without a lower loss the training "
                    "stops, and the best step is saved.\n\nThe learning rate is too high on purpose: the last samples "
                    "show what early stopping avoids.\n\nFor your own images set both numbers to 100 or so, and "
                    "`clip_model` to (none).",
                    380,
                ),
                width=250,
            ),
            column("4", width=320),
        ),
        step("Generate", column("5", "8"), column("6")),
        step("Score", column("7", width=270)),
    ),
    "generate_with_lora_stack": (
        step(
            "Base and LoRAs",
            column(
                "1",
                "2",
                Note(
                    "A stack of LoRAs",
                    "Each *Load LoRA* adds one to the stack: here a second LoRA to the first, at two strengths.",
                    110,
                ),
                Note(
                    "What the cache does",
                    "Images are cached by what they were made of: change one strength, and only that column is "
                    "generated again. *SDXL Image Cache* shows and limits the space they take.",
                    150,
                ),
            ),
            column("3", "6"),
        ),
        step("Three strengths: same prompts, same seeds", column("4"), column("8"), column("7")),
        step(
            "Keep; what each LoRA changes",
            column("5", "9", "10", width=250),
        ),
    ),
    "save_and_merge": (
        step(
            "Base and LoRAs",
            column(
                "1",
                "2",
                Note("Save and merge", "Nothing is overwritten: a name that is taken gets a number.", 90),
            ),
            column(
                "3",
                Note(
                    "Three ways to keep a stack",
                    "**Save LoRA**: one file that acts as the stack, here at rank 8.\n\n**Merge LoRAs**: one LoRA by "
                    "a method that settles conflicts, here *ties*.\n\n**Save Merged Base**: a whole model with the "
                    "LoRAs in its weights. For real SDXL the layout *single_file* gives a checkpoint.",
                    260,
                ),
            ),
        ),
        step("Save", column("6", "5", "4", width=300)),
        step("Use what was saved", column("8", width=300), column("7", width=300)),
    ),
    "image_to_image": (
        step(
            "Images",
            column("1", "2", Note("One image", "For one image instead of a folder use *Load Image*.", 90)),
        ),
        step("Size and LoRA", column("3", "4")),
        step("Redraw", column("5", width=320)),
        step(
            "Save",
            column(
                "6",
                Note(
                    "Redraw images in a style",
                    "Each image starts from one of the folder's, and the LoRA draws it anew. The advanced input "
                    "`denoise` of *Redrawn* is 0.75: lower keeps more of the image, 1 keeps nothing.\n\nConnect a "
                    "`mask` to repaint only a part.",
                    210,
                ),
                width=320,
            ),
        ),
    ),
    "controlnet_with_lora_sdxl": (
        step(
            "Images",
            column(
                "1",
                "2",
                real_sdxl(
                    "A ControlNet and a LoRA",
                    " The ControlNet belongs in `models/controlnet`, the LoRA in `models/loras`.",
                ),
            ),
        ),
        step("Edges and style", column("3", "6", width=270), column("4", width=230), column("5", width=260)),
        step("Generate", column("7", width=320)),
        step(
            "Save",
            column(
                "8",
                Note(
                    "What acts on the image",
                    "*Canny* finds the edges of the images, the ControlNet keeps them, and the LoRA gives the style. "
                    "`denoise` 0.9 keeps a little of the colours too.\n\nSeveral *Add ControlNet* in a row act "
                    "together.",
                    210,
                ),
                width=320,
            ),
        ),
    ),
    "second_pass": (
        step("Base and LoRA", column("1", "2")),
        step("Generate", column("3", width=320), column("4", width=320)),
        step(
            "Save",
            column(
                "5",
                Note(
                    "Larger, with more detail",
                    "*With a second pass* enlarges each image by `hires_scale` 1.5 and denoises it again with "
                    "`hires_denoise` 0.4; both are advanced inputs. The first pass is not repeated: it comes from the "
                    "cache.",
                    190,
                ),
                width=380,
            ),
        ),
    ),
    "score_images": (
        step(
            "Base",
            column(
                "1",
                Note(
                    "Keep the best of many",
                    "Eight images of one prompt, sorted by how well they match it.\n\nThe bundled CLIP knows only the "
                    "bundled shapes: for your own images put a CLIP model into `models/clip_score` and choose it.",
                    200,
                ),
            ),
        ),
        step("Generate", column("2", width=320)),
        step("Score", column("3", width=380)),
        step("Keep", column("4", width=380)),
    ),
    "compare_loras": (
        step(
            "LoRAs",
            column(
                "1",
                "2",
                Note(
                    "What is compared",
                    "The base without a LoRA, the 8-bit LoRA at two strengths (`columns`), and the line LoRA: the same "
                    "8 prompts and seeds. Other axes: `checkpoint: all`, `steps: 10, 25`, `sampler: euler, dpmpp_2m`.",
                    160,
                ),
                width=240,
            ),
            column("3", width=240),
            column("4", width=220),
        ),
        step("Compare", column("5", width=380), column("7", width=310)),
        step("Find the strength", column("6", width=360)),
    ),
    "pick_checkpoint": (
        step("Data", column("1", "2", width=270)),
        step(
            "Check, and keep every 50 steps",
            column(
                "3",
                "4",
                Note(
                    "Which step is the best?",
                    "Each kept LoRA is compared by how well it follows the prompts, also those that the data does not "
                    "have, and by how similar its images are to the five that are held out. One that copies training "
                    "images is flagged.",
                    160,
                ),
                width=290,
            ),
        ),
        step("Train", column("5", width=290)),
        step("Pick", column("6", width=420)),
        step("Use", column("7", width=300)),
    ),
    "score_a_folder": (
        step(
            "Folder",
            column(
                "1",
                OWN_IMAGES,
                Note(
                    "Score any folder",
                    "Each image is scored against its own caption. Look at those with the lowest score: often the "
                    "caption does not fit.\n\nThe references are images of the same folder here: choose another one.",
                    150,
                ),
                width=290,
            ),
        ),
        step("Images and captions", column("2", "10", width=280)),
        step("Score", column("3", "8", width=330), column("7", "4", width=330)),
        step("Keep the best", column("6", width=280), column("5", width=260)),
    ),
    "train_and_compare_sdxl": (
        step("Data", column("1", "2", real_sdxl("Train a LoRA for SDXL"))),
        step(
            "Train",
            column(
                "10",
                OWN_IMAGES,
                Note(
                    "Samples while it trains",
                    f"{TRAINING}\n\nThe LoRA is in `output/loras`, the run with its settings and samples in "
                    "`output/lora_runs`.",
                    230,
                ),
                width=250,
            ),
            column("3", width=320),
        ),
        step("Compare: same prompts, same seeds", column("5", width=280), column("4", width=280)),
        step("Save", column("7", "6", width=280)),
    ),
    "train_style_sdxl": (
        step("Data", column("1", "2", real_sdxl("Train a style"))),
        step(
            "Options",
            column(
                "3",
                Note(
                    "Watching",
                    "A tenth of the images is held out. The step with the lowest loss on them is saved.",
                    110,
                ),
                width=250,
            ),
            column("4", OWN_IMAGES, width=250),
            column(
                "8",
                Note(
                    "Images of a style",
                    "20 to 50 images in one style, with captions that say **what** is shown, not how. The preset "
                    "*style* trains the convolutions too, where texture lives.",
                    170,
                ),
                width=250,
            ),
        ),
        step("Train", column("5", width=310)),
        step("Generate", column("6")),
    ),
    "train_character_sdxl": (
        step("Data", column("1", "2", real_sdxl("Train a character"))),
        step(
            "Options",
            column(
                "8",
                Note(
                    "Images of a character",
                    "10 to 30 images of one character. The trigger word `ohwx` stands before every caption and calls "
                    "the character in a prompt.",
                    150,
                ),
                width=250,
            ),
            column(
                "3",
                Note(
                    "Regularisation",
                    "The base generates images of `class_prompt` once, and they are trained too, so that the class "
                    "stays what it was. Write the class of yours: *a photo of a woman*. Or connect a second *Load "
                    "Caption Dataset* with `is_regularisation`.",
                    210,
                ),
                width=250,
            ),
            column("4", OWN_IMAGES, width=280),
        ),
        step("Train", column("5", width=310)),
        step("Generate", column("6")),
    ),
    "train_8gb_sdxl": (
        step("Data", column("1", "2", real_sdxl("Train with 8 GB"))),
        step(
            "Options",
            column("8", OWN_IMAGES, width=270),
            column(
                "3",
                Note(
                    "What saves memory",
                    "The preset *low memory (8 GB)* recomputes activations and adds up four batches of one image. "
                    "768 pixels instead of 1024 save more than anything else. `memory_limit_gb` 7 leaves a gigabyte "
                    "to the screen.\n\nStill too much? Rank 4, or *Train Options: Optimizer* with *adamw8bit*, which "
                    "needs the package bitsandbytes.",
                    280,
                ),
                width=270,
            ),
        ),
        step("Train", column("5", width=320)),
        step("Generate", column("6")),
        step("Save", column("7", width=300)),
    ),
    "ksampler_with_lora_stack_sdxl": (
        step("Checkpoint and LoRA", column("1", "2", real_sdxl("A stack for KSampler"))),
        step(
            "Apply",
            column(
                "4",
                Note(
                    "Apply LoRA Stack",
                    "It patches ComfyUI's MODEL and CLIP, in every key format that *Load LoRA* reads. What does not "
                    "fit is listed on the node.\n\nFor several LoRAs, put further *Load LoRA* nodes in a row before "
                    "it.",
                    190,
                ),
            ),
        ),
        step("Prompt", column("5", "6", "7", width=270)),
        step("Sample", column("8", width=270), column("9", width=230)),
        step("Save", column("10", width=300)),
    ),
    "vote": (
        step(
            "Base and LoRAs",
            column(
                "1",
                "2",
                Note(
                    "Vote blind",
                    "**Run**, then *Open the voting page* on *Human Compare*. Keys 1 and 2 choose an image, space is "
                    "no difference. *Run* again for the ranking: the images come from the cache.\n\nDo not look at the "
                    "grid first. Others vote at the same address, on a phone too; start ComfyUI with `--listen` for "
                    "them.",
                    230,
                ),
                width=270,
            ),
            column("3", width=270),
            column("4", width=270),
        ),
        step("Compare", column("5", width=330)),
        step("Vote", column("6", "7", width=330)),
    ),
    "sd15_against_sdxl": (
        step(
            "Models",
            column(
                "1",
                "2",
                real_sdxl(
                    "SD 1.5 against SDXL",
                    " Stable Diffusion 1.5 is `v1-5-pruned-emaonly-fp16.safetensors` in the same folder.",
                ),
                width=290,
            ),
            column(
                "3",
                "4",
                Note(
                    "Mean and deviation of the CLIP score",
                    "SD 1.5, SDXL and SDXL with the LoRA make the same prompts and seeds, each in its own size. "
                    "The table has mean and standard deviation over all images, and the paired difference to SDXL with "
                    "its interval.\n\nChoose a real CLIP model as `clip_model`: the bundled one knows only shapes.",
                    230,
                ),
                width=290,
            ),
        ),
        step("Compare", column("5", width=340)),
        step("Results", column("6", "7", width=330)),
    ),
    "caption_then_train": (
        step(
            "Models and images",
            column(
                "1",
                "2",
                Note(
                    "Your own images",
                    "Put them into `input/my_images`, or choose another folder. The captioner is the folder "
                    "`models/captioners/Florence-2-base`, a copy of *florence-community/Florence-2-base*; BLIP and "
                    "taggers will do, too. To download it, write its name into the advanced `hub_id`.",
                    130,
                ),
                width=310,
            ),
        ),
        step(
            "Check the captions",
            column(
                "3",
                Note(
                    "Correct them by hand",
                    "Click a caption on *Load Caption Dataset* to change it. *Caption Images* keeps what you write.",
                    110,
                ),
                width=300,
            ),
            column("4", width=300),
        ),
        step("Train", column("5", width=310)),
        step("Generate", column("6", width=280)),
    ),
}
