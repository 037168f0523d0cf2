@echo -off
echo LAB blk read script
map -r
fs0:
cp pattern copied
comp pattern copied
echo LAB guest end
reset -s
