"""A clip from a prompt with diffusers alone: an ordinary WAN script, which knows nothing of wan-runtime.

It is diffusers' own text-to-video example for Wan, with the model, the device and the sizes as options. Run it as it
is, or with every WAN model patched as it is loaded:

    python examples/text_to_video.py --model Wan-AI/Wan2.1-T2V-14B-Diffusers
    wan-runtime run --weights nvfp4 -- examples/text_to_video.py --model Wan-AI/Wan2.1-T2V-14B-Diffusers
"""

import argparse

import torch
from diffusers import AutoencoderKLWan, WanPipeline
from diffusers.schedulers import UniPCMultistepScheduler
from diffusers.utils import export_to_gif

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument(
    "--model", default="Wan-AI/Wan2.1-T2V-14B-Diffusers", help="diffusers directory or hub id"
)
parser.add_argument("--device", default="cuda")
parser.add_argument("--prompt", default="A cat and a dog baking a cake together in a kitchen.")
parser.add_argument(
    "--negative", default="Bright tones, overexposed, static, blurred details, subtitles, low quality"
)
parser.add_argument("--height", type=int, default=720)
parser.add_argument("--width", type=int, default=1280)
parser.add_argument("--frames", type=int, default=81)
parser.add_argument("--steps", type=int, default=50)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--output", default="output.gif")
args = parser.parse_args()

# The VAE decodes in fp32; the transformer and the text encoder run in bf16.
vae = AutoencoderKLWan.from_pretrained(args.model, subfolder="vae", torch_dtype=torch.float32)
pipe = WanPipeline.from_pretrained(args.model, vae=vae, torch_dtype=torch.bfloat16)
flow_shift = 5.0 if args.height >= 720 else 3.0
pipe.scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config, flow_shift=flow_shift)
pipe.to(args.device)

frames = pipe(
    prompt=args.prompt,
    negative_prompt=args.negative,
    height=args.height,
    width=args.width,
    num_frames=args.frames,
    num_inference_steps=args.steps,
    guidance_scale=5.0,
    generator=torch.Generator("cpu").manual_seed(args.seed),
    output_type="pil",
).frames[0]
export_to_gif(frames, args.output, fps=16)
print(f"{args.output}: {len(frames)} frames of {args.width}x{args.height}")
