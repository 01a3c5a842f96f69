"""Other tools doing the same work as hpsearch, each a program of its own: its memory and warm state are its own."""
