"""The favicon and the social picture: `python .ci/pictures.py` writes nbs/images/favicon.svg and
nbs/images/social.png."""

import io
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image

matplotlib.use("agg")
import matplotlib.pyplot as plt

OUT = Path(__file__).parents[1]/"nbs"/"images"
INK, PAPER, SKY, MEAN = "#17324d", "#f4f7fa", "#8fb3d9", "#ea580c"


def unit(x):
    return x/np.linalg.norm(x)


def arc(a, b, n=60):
    "The great circle from a to b: (n, 3)."
    angle = np.arctan2(np.linalg.norm(np.cross(a, b)), a @ b)
    t = np.linspace(0, 1, n)[:, None]
    return (np.sin((1 - t)*angle)*a + np.sin(t*angle)*b)/np.sin(angle)


def karcher(xs, steps=50):
    "Of unit vectors."
    m = unit(sum(xs))
    for _ in range(steps):
        logs = [
            (x - (m @ x)*m)
            * np.arctan2(np.linalg.norm(np.cross(m, x)), m @ x)
            / np.linalg.norm(x - (m @ x)*m)
            for x in xs
        ]
        v = sum(logs)/len(xs)
        n = np.linalg.norm(v)
        if n < 1e-15:
            break
        m = np.cos(n)*m + np.sin(n)*v/n
    return m


# seen along the z-axis
MODELS = [
    unit(np.array(x)) for x in ([-0.72, -0.12, 0.62], [0.62, -0.45, 0.62], [0.12, 0.80, 0.55])
]


def favicon():
    m = karcher(MODELS)

    def xy(p):
        return f"{32 + 26 * p[0]:.1f},{32 - 26 * p[1]:.1f}"

    paths = "".join(f'<polyline points="{" ".join(xy(p) for p in arc(m, x, 9))}"/>' for x in MODELS)
    dots = "".join('<circle cx="{}" cy="{}" r="5.5"/>'.format(*xy(x).split(",")) for x in MODELS)
    cx, cy = xy(m).split(",")
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 64 64"><circle cx="32" '
        f'cy="32" r="31" fill="{INK}"/>'
        f'<g fill="none" stroke="{SKY}" stroke-width="3.5">{paths}</g><g '
        f'fill="#fff">{dots}</g><circle cx="{cx}" cy="{cy}" r="7.5" '
        f'fill="{MEAN}"/></svg>\n'
    )


def rings() -> list[np.ndarray]:
    "Parallels and meridians of a sphere, (400, 3) each."
    s = np.linspace(0, 2*np.pi, 400)
    found = []
    for angle in np.deg2rad(np.linspace(-80, 80, 9)):
        c, h = np.cos(angle), np.sin(angle)
        found.append(np.stack([c*np.cos(s), np.full(400, h), c*np.sin(s)], 1))
        found.append(np.stack([h*np.cos(s), np.sin(s), c*np.cos(s)], 1))
    return found


def globe(ax):
    "A sphere, tilted towards the reader."
    ax.set_aspect("equal")
    ax.axis("off")
    ax.add_patch(plt.Circle((0, 0), 1, color="#224668"))
    c, s = np.cos(0.5), np.sin(0.5)
    for x, y, z in (ring.T for ring in rings()):
        y, z = c*y + s*z, c*z - s*y
        ax.plot(np.where(z > 0, x, np.nan), y, color="#34597d", lw=1)
    ax.set_xlim(-1.08, 1.08)
    ax.set_ylim(-1.08, 1.08)


def social():
    "1200 by 630: three models on a sphere, the geodesics, and their mean."
    fig = plt.figure(figsize=(12, 6.3), dpi=100, facecolor=INK)
    ax = fig.add_axes([0.535, 0.06, 0.455, 0.88])
    globe(ax)
    m = karcher(MODELS)
    for x in MODELS:
        ax.plot(*arc(m, x).T[:2], color=SKY, lw=4, solid_capstyle="round")
        ax.plot(*x[:2], "o", color="white", ms=17)
    ax.plot(*m[:2], "o", color=MEAN, ms=25)
    fig.text(0.06, 0.60, "frechet_merge", color="white", size=45, weight="bold")
    claim = "Merge neural networks\nas Fréchet means"
    fig.text(0.06, 0.47, claim, color=SKY, size=29, va="top", linespacing=1.5)
    return fig


if __name__ == "__main__":
    OUT.mkdir(exist_ok=True)
    (OUT/"favicon.svg").write_text(favicon())
    raw = io.BytesIO()
    social().savefig(raw)
    Image.open(raw).convert("RGB").quantize(64).save(OUT/"social.png", optimize=True)
