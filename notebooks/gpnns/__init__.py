"""The course's own package. One file for each lesson; images/, encoders/ and world/ are what lessons build on, claims/ and tools/ what
makes the things that the course ships."""
