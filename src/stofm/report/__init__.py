"""One page of HTML about a slice, with plots that are linked: arrays in, text out."""
