import diffusers
import pytest
import torch
from PIL import Image

import diffaccel
from diffaccel import zoo
from diffaccel.zoo.pixel import PixelPipeline


def tiny_unet(classes=None):
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=8, block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1, num_class_embeds=classes,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
    ).eval()  # fmt: skip


def tiny_dit():
    torch.manual_seed(0)
    return diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=3, out_channels=6, num_layers=1, sample_size=8,
        num_embeds_ada_norm=10, norm_num_groups=1,
    ).eval()  # fmt: skip


def test_emoji_sd_is_a_plain_pipeline_that_draws():
    pipe = zoo.load("emoji-sd")
    assert type(pipe) is diffusers.StableDiffusionPipeline
    assert pipe.unet.dtype == torch.float32
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = diffaccel.DPMSolverScheduler.from_config(pipe.scheduler.config)
    generator = torch.Generator().manual_seed(0)
    picture = pipe("red heart, twemoji style", num_inference_steps=6, guidance_scale=4.0, generator=generator).images[0]
    assert picture.size == (64, 64)
    red, green, _ = picture.convert("RGB").getpixel((32, 26))
    assert red > green + 60  # a heart, and it is red


def test_emoji_clip_knows_a_red_picture():
    model, processor = zoo.load("emoji-clip")
    pictures = [Image.new("RGB", (64, 64), colour) for colour in ((221, 46, 68), (85, 172, 238))]
    inputs = processor(text=["red square", "blue square"], images=pictures, return_tensors="pt", padding="max_length")
    with torch.no_grad():
        logits = model(**inputs).logits_per_image
    assert logits.argmax(1).tolist() == [0, 1]


def test_emoji_sd_small_fits_emoji_sd():
    pipe, small = zoo.load("emoji-sd"), zoo.load("emoji-sd-small")
    assert type(small) is diffusers.UNet2DConditionModel
    assert not small.training
    assert small.dtype == torch.float32
    pipe.set_progress_bar_config(disable=True)
    captions = [f"{name}, twemoji style" for name in ("red heart", "full moon", "open book", "crying face")]
    call = {"num_inference_steps": 10, "guidance_scale": 4.0, "output_type": "pt"}

    def pictures():
        return pipe(captions, generator=[torch.Generator().manual_seed(seed) for seed in range(4)], **call).images

    whole, other = pictures(), {}
    for fraction in (0.2, 1.0):
        with diffaccel.stitch(pipe, small, fraction=fraction) as handle:
            other[fraction] = (pictures() - whole).square().mean().item()
            report = handle.report()
            assert report.macs / report.full == pytest.approx(1 - fraction * (1 - 0.278), abs=2e-3)
    noise = (whole - whole.roll(1, 0)).square().mean().item()  # pictures of other captions
    assert other[0.2] < other[1.0] < 0.7 * noise


def test_all_weights_are_small():
    assert sum(file.stat().st_size for file in zoo.FOLDER.rglob("*")) < 40e6


def test_unknown_name_lists_those_there_are():
    with pytest.raises(ValueError, match="use emoji-sd or emoji-clip"):
        zoo.load("emoji")


@pytest.mark.parametrize("name", zoo.NAMES)
def test_every_model_has_a_card_with_data_and_licence(name):
    card = (zoo.path(name) / "README.md").read_text()
    for word in ("CC-BY 4.0", "Twemoji", "Trained", "Limits"):
        assert word in card


@pytest.mark.parametrize(
    ("networks", "call"),
    [
        ({"unet": tiny_unet()}, {"batch_size": 2}),
        ({"unet": tiny_unet(classes=11)}, {"class_labels": [1, 2], "guidance_scale": 2.0}),
        ({"transformer": tiny_dit()}, {"class_labels": [1, 2], "guidance_scale": 2.0}),
    ],
    ids=["unconditional", "unet", "dit"],
)
def test_pixel_pipeline_saves_reloads_and_agrees_with_diffusers(networks, call, tmp_path):
    stock = diffusers.DPMSolverMultistepScheduler()
    pipe = PixelPipeline(stock, **networks)
    pipe.set_progress_bar_config(disable=True)

    def picture(pipeline):
        return pipeline(num_inference_steps=4, generator=torch.Generator().manual_seed(0), output_type="pt", **call)[0]

    expected = picture(pipe)
    pipe.scheduler = diffaccel.DPMSolverScheduler.from_config(stock.config, solver_options={"timesteps": "integer"})
    torch.testing.assert_close(picture(pipe), expected, rtol=1e-5, atol=1e-5)
    pipe.save_pretrained(tmp_path)
    again = PixelPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert type(again.scheduler) is diffaccel.DPMSolverScheduler
    torch.testing.assert_close(picture(again), picture(pipe))


def test_pixel_pipeline_runs_flow_models():
    pipe = PixelPipeline(diffaccel.FlowEulerScheduler(), transformer=tiny_dit())
    pipe.set_progress_bar_config(disable=True)
    assert pipe(class_labels=[3], num_inference_steps=3)[0][0].size == (8, 8)


def test_pixel_pipeline_refuses_labels_it_has_no_use_for():
    with pytest.raises(ValueError, match="class-conditional"):
        PixelPipeline(diffusers.DDIMScheduler(), transformer=tiny_dit())(num_inference_steps=2)
    with pytest.raises(ValueError, match="no classes"):
        PixelPipeline(diffusers.DDIMScheduler(), unet=tiny_unet())(class_labels=[1])
    with pytest.raises(ValueError, match="one network"):
        PixelPipeline(diffusers.DDIMScheduler())
