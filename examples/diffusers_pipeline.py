"""Pipelines of diffusers whose transformer is split over ranks; scheduler and VAE run on every rank as they are.

    torchrun --nproc-per-node 2 examples/diffusers_pipeline.py --pipeline flux --inner aot_eager

The weights are few and random, so the images are noise. A pipeline made by `from_pretrained` takes the same line, `autoseq.parallelize`.
Every rank calls the pipeline with the same prompt and a generator of the same seed, and gets the same images.
"""

import argparse

import torch
import torch.distributed as dist
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)

import autoseq


def vae():
    return AutoencoderKL(block_out_channels=(32,), latent_channels=4, sample_size=16, use_quant_conv=False, shift_factor=0.0)


def dit():
    """From class labels to images, by self-attention over patches."""
    transformer = DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=16, patch_size=2,
        num_embeds_ada_norm=1000,  # the pipeline's label for "no class" is 1000
    )  # fmt: skip
    return DiTPipeline(transformer.eval(), vae(), DDIMScheduler())


def flux():
    """From embedded prompts to images, by joint attention over text and patches. The text encoders are left out."""
    transformer = FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, num_attention_heads=2, attention_head_dim=16, joint_attention_dim=32,
        pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    return FluxPipeline(FlowMatchEulerDiscreteScheduler(), vae(), None, None, None, None, transformer.eval())


PIPELINES = {"dit": dit, "flux": flux}


def draw(pipe, steps=3):
    """Two images."""
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    usual = {"num_inference_steps": steps, "generator": generator, "output_type": "pt", "return_dict": False}
    if isinstance(pipe, DiTPipeline):
        return pipe(class_labels=[1, 2], **usual)[0]
    text, pooled = torch.randn(2, 7, 32, generator=generator), torch.randn(2, 32, generator=generator)
    return pipe(prompt_embeds=text, pooled_prompt_embeds=pooled, height=32, width=32, **usual)[0]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--pipeline", choices=PIPELINES, default="dit")
    parser.add_argument("--inner", default="inductor", help="aot_eager needs no C++ compiler")
    args = parser.parse_args()
    dist.init_process_group()
    torch.manual_seed(0)  # the same weights on all ranks
    pipe = PIPELINES[args.pipeline]()
    autoseq.parallelize(pipe.transformer, inner=args.inner)
    images = draw(pipe)
    if dist.get_rank() == 0:
        print(f"{len(images)} images of {tuple(images.shape[1:])}, mean {images.mean():.6f}")
        print(autoseq.report(pipe.transformer))
    dist.destroy_process_group()
