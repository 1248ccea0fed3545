"""Several devices decode or encode one video: they share its rows of pixels, or the tiles it is cut into.

**Strips.** A decoder's input is cut along the height, a strip a device. What a convolution needs of the rows beyond its
strip (a halo) comes from the neighbours at the moment at which the module pads: padding at the picture's own border
stays padding, padding elsewhere becomes rows of a neighbour. So every output is the same sum of the same numbers as on
one device, whatever the depth of the network. Group norms are taken over all strips; attention over a picture reads the
keys and values of all strips. What is kept from frame to frame (Wan's cache) is kept strip by strip.

**Tiles.** Where a VAE cuts its input into tiles (`vae="tiled"`, and Hunyuan's parts of long videos), each device runs
its share of them, whole, and all blend the same tiles: bit for bit what one device makes.

Modules stay diffusers' own; what is put around them here is the forward of encoder and decoder.
"""

from kinetoscope.parallel.vae.sharing import check_shared, share_vae

__all__ = ["check_shared", "share_vae"]
