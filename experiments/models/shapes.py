"""The shape of an image, for which a network is built."""

Shape = tuple[int, int, int]  # channels, height, width
