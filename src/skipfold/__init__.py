"""Skip connections, folded away: a replication, and a library for networks of your own.

- `skipfold.collapse.collapse`: an affine network of any wiring as one layer, with a certificate.
- `skipfold.pixels.PixelLayer`: that layer on uint8 pixels, as one kernel on CUDA.
- `skipfold.homotopy.to_homotopy`: a network with skip strength t in every block; `StrengthScheduler` and
  `skipfold.schedules.Schedule` let it go to 0, `skipfold.lightning` as a callback.
- `skipfold.removal.remove_skips`: the network at t = 0 without its skips; `skipfold.cropping.crop_dead_taps`.
- `skipfold.folding.fold_affine`: neighbouring affine layers as one, at any t.
- `skipfold.errors`: what is raised.

Everything is imported from its own module. The replication that this grew from is `skipfold.replication`.
"""
