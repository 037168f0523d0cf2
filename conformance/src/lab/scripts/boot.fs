s" /pci@800000020000000/scsi@0" open-dev value disk
: do-disk disk $call-method ;
0 0 s" seek" do-disk drop
4000000 LENGTH s" read" do-disk drop
." LAB blk read " 0 LENGTH 0 do i 4000000 + @ + 8 +loop . cr
PLACE 0 s" seek" do-disk drop
." LAB blk wrote " 4000000 400 s" write" do-disk . cr
." LAB guest end" cr
reset-all
