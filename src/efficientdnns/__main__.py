from efficientdnns.cli import main

main()
