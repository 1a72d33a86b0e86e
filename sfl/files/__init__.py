"""Reading and writing files: JSON, torch files and checksums, also from untrusted sources."""
