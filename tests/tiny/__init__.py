"""Random networks of a few thousand weights inside the real pipelines, and what a test asks of a picture."""

from tests.tiny.dit import dit as dit
from tests.tiny.dit import pixart as pixart
from tests.tiny.flow import flux as flux
from tests.tiny.flow import flux_img2img as flux_img2img
from tests.tiny.flow import flux_inpaint as flux_inpaint
from tests.tiny.flow import sana as sana
from tests.tiny.flow import sd3 as sd3
from tests.tiny.flow import sd3_img2img as sd3_img2img
from tests.tiny.flow import sd3_inpaint as sd3_inpaint
from tests.tiny.run import SD_BETAS as SD_BETAS
from tests.tiny.run import SIZE as SIZE
from tests.tiny.run import Toy as Toy
from tests.tiny.run import draw as draw
from tests.tiny.run import noise as noise
from tests.tiny.run import relative as relative
from tests.tiny.unet import playground as playground
from tests.tiny.unet import sd as sd
from tests.tiny.unet import sd_img2img as sd_img2img
from tests.tiny.unet import sd_inpaint as sd_inpaint
from tests.tiny.unet import sdxl as sdxl
from tests.tiny.unet import sdxl_img2img as sdxl_img2img
from tests.tiny.unet import sdxl_inpaint as sdxl_inpaint
from tests.tiny.video import hunyuan_video as hunyuan_video
from tests.tiny.video import svd as svd
from tests.tiny.video import wan as wan
