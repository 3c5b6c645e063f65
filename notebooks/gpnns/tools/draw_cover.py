"""Draw the README's figure, notebooks/cover.jpg: `python -m gpnns.tools.draw_cover`."""

import gpnns_utils as gu
from gpnns import figures

if __name__ == "__main__":
    gu.setup()
    photos = gu.load_images("mini", "test")
    encoders = [gu.load_encoder(name) for name in ("mini", "mini@arcmargin")]
    (gu.COURSE / "cover.jpg").write_bytes(figures.show_before_and_after(*encoders, photos, size=1.0).data)
    first = [100 * figures.find_neighbours(encoder, photos)[1][:, 0].mean() for encoder in encoders]
    print(f"first neighbour right for {first[0]:.1f} % of {len(photos):,} queries before, {first[1]:.1f} % after")
