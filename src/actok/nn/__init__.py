"""Blocks of networks that the learned codecs share: attention, feed-forward, convolution in time."""
