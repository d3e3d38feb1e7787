"""Binary connection masks over frozen weights (S3-Router): selection, scores, masked modules, and the mask bank."""
