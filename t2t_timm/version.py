__version__ = '0.1.0'
REPOSITORY = 'https://github.com/OWNER/t2t-timm'  # OWNER: until the project has a home (docs/releasing.md)
