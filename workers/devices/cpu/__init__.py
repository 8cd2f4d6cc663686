"""The CPU device: `device` is where it begins; a plan is bound by `binding`, and `weights` are packed."""
