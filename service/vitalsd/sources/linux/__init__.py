"""Read processes of Linux from /proc."""
