"""`python -m asvit_deploy`."""

from asvit_deploy.cli.main import main

if __name__ == "__main__":
    main()
