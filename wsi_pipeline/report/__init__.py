"""What people look at: pages, curves, pictures, and their templates."""
