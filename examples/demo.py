"""`make demo`: a quantised checkpoint, a real server, one clip over HTTP.

Makes the NVFP4 file of the bundled tiny model, serves it with `wan-serve`, asks for a clip as any client would, saves
it as demo.mp4, and looks at the frames to see whether they show what was asked. Exits non-zero if anything fails.
With --serve it keeps the server up instead (`make serve`).
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import av
import httpx
import numpy as np
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import wan_runtime
from wan_runtime import tiny
from wan_runtime.tiny import checker, words

ROOT = Path(__file__).resolve().parent.parent
SOURCE = tiny.path() / "transformer" / "diffusion_pytorch_model.safetensors"
CHECKPOINT = ROOT / "build" / "tiny" / "wan-tiny-nvfp4.safetensors"
PROMPT = "a large orange circle moving right on a black background"
SEED = 7
START_SECONDS = 300
# One thread is a third slower than two on two idle cores, and several times faster where something else runs too.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", **os.environ}
console = Console(stderr=True)


class DemoFailed(Exception):
    """A step of the demo did not do what it should have."""


def main(
    prompt: Annotated[str, typer.Option(help="What the clip is to show.")] = PROMPT,
    output: Annotated[Path, typer.Option(help="Where to save it.")] = ROOT / "demo.mp4",
    seed: Annotated[int, typer.Option(help="Of the first noise.")] = SEED,
    serve: Annotated[bool, typer.Option("--serve", help="Keep the server up; make no clip.")] = False,
    port: Annotated[int, typer.Option(help="The server's port, with --serve.")] = 8000,
) -> None:
    """Serves the bundled tiny model in NVFP4, makes one clip over HTTP, saves and checks it."""
    try:
        words.parse(prompt)  # the checker must be able to say whether the clip shows it
        make_checkpoint()
        if serve:  # becomes the server, so that signals reach it and its exit status is ours
            os.chdir(ROOT)
            os.execve(sys.executable, command(port, ROOT / "build" / "serve"), ENVIRONMENT)
        with tempfile.TemporaryDirectory(prefix="wan-demo-") as folder, serving(Path(folder)) as url:
            content = ask(url, prompt, seed)
        output.write_bytes(content)
        look(output, prompt)
    except (DemoFailed, ValueError, httpx.HTTPError, wan_runtime.WanRuntimeError) as error:
        console.print(f"[red]The demo failed:[/] {error}")
        raise typer.Exit(1) from error
    print(output)


def make_checkpoint() -> None:
    """The tiny transformer in NVFP4, under original names, as ModelOpt would write it."""
    if CHECKPOINT.exists() and CHECKPOINT.stat().st_mtime > SOURCE.stat().st_mtime:
        return
    CHECKPOINT.parent.mkdir(parents=True, exist_ok=True)
    with console.status("quantising the bundled tiny model to NVFP4"):
        wan_runtime.convert(SOURCE, CHECKPOINT, to="modelopt-nvfp4", names="original")
    before, after = SOURCE.stat().st_size, CHECKPOINT.stat().st_size
    console.print(
        f"quantised {before / 2**20:.1f} MiB of bf16 to {after / 2**20:.1f} MiB of NVFP4: {CHECKPOINT}"
    )


def command(port: int, data_dir: Path) -> list[str]:
    """The server's command line."""
    options = ["--checkpoint", str(CHECKPOINT), "--port", str(port), "--data-dir", str(data_dir)]
    return [sys.executable, "-m", "wan_runtime.serve", *options]


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """The address of a server that is ready; it is stopped at the end."""
    log = folder / "server.log"
    with log.open("wb") as out:
        server = subprocess.Popen(
            command(0, folder / "data"), cwd=ROOT, env=ENVIRONMENT, stdout=out, stderr=subprocess.STDOUT
        )
    try:
        yield wait_ready(server, log)
    except (DemoFailed, httpx.HTTPError):
        console.print(log.read_text(), markup=False, highlight=False)
        raise
    finally:
        server.terminate()
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def wait_ready(server: subprocess.Popen[bytes], log: Path) -> str:
    """Waits for /readyz, showing the phase that the server says it is in."""
    began = time.monotonic()
    with console.status("starting wan-serve") as status:
        while time.monotonic() - began < START_SECONDS:
            if server.poll() is not None:
                raise DemoFailed(f"wan-serve ended with the status {server.returncode}.")
            if match := re.search(r"listening on (http://\S+),", log.read_text()):
                try:
                    answer = httpx.get(f"{match[1]}/readyz", timeout=5)
                    if answer.status_code == 200:
                        console.print(
                            f"wan-serve is ready at {match[1]} after {time.monotonic() - began:.0f} s"
                        )
                        return match[1]
                    status.update(f"wan-serve: {answer.json()['phase']}")
                except httpx.ConnectError:
                    pass  # bound, and not answering yet
            time.sleep(0.2)
    raise DemoFailed(f"wan-serve was not ready after {START_SECONDS} s.")


def ask(url: str, prompt: str, seed: int) -> bytes:
    """Creates a video, follows it to its end, and returns the MP4."""
    console.print(f"prompt: {prompt}")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with httpx.Client(base_url=f"{url}/v1", timeout=60) as client, Progress(*columns, console=console) as bar:
        video = answer_of(client.post("/videos", json={"prompt": prompt, "seed": seed}))
        task = bar.add_task("queued", total=video["num_inference_steps"])
        while video["status"] in ("queued", "in_progress"):
            time.sleep(0.2)
            video = answer_of(client.get(f"/videos/{video['id']}"))
            bar.update(task, completed=video["step"], description=video["phase"] or video["status"])
        if video["status"] != "completed":
            raise DemoFailed(f"the video failed: {video['error']['code']}: {video['error']['message']}")
        content = client.get(f"/videos/{video['id']}/content")
        content.raise_for_status()
    return content.content


def answer_of(response: httpx.Response) -> dict[str, Any]:
    """The body of a good answer."""
    body: dict[str, Any] = response.json()
    if response.is_error:
        raise DemoFailed(f"the server answered {response.status_code}: {body['error']['message']}")
    return body


def look(path: Path, prompt: str) -> None:
    """Reads the saved file and checks by plain image processing that it shows what the prompt says."""
    with av.open(str(path)) as container:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    shown = checker.read(frames)
    seen = f"a {shown.size} {shown.color} {shown.shape} {shown.motion} on a {shown.background} background"
    if wrong := checker.wrong(frames, prompt):
        raise DemoFailed(
            f"{path} was saved, and its {', '.join(wrong)} is not what was asked: it shows {seen}."
        )
    console.print(f"{len(frames)} frames, and they show {seen}")


if __name__ == "__main__":
    typer.run(main)
