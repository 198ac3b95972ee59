"""Where arrays meet AnnData: tables, slices, counts, records and files, and the steps between them."""
